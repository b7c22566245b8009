import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { before, describe, test } from 'node:test';
import { App, Aws, Stack, Token } from 'aws-cdk-lib';
import { Vpc } from 'aws-cdk-lib/aws-ec2';
import { Key } from 'aws-cdk-lib/aws-kms';
import { Bucket } from 'aws-cdk-lib/aws-s3';
import { Topic } from 'aws-cdk-lib/aws-sns';
import { ClipImagePipeline } from 'clip-image-processor/pipeline';
import { evaluate } from './evaluate.mjs';
import { specialise } from '../dist/template.js';

const TEMPLATE = JSON.parse(readFileSync(new URL('../dist/template.json', import.meta.url), 'utf8'));
const KEY = 'arn:aws:kms:eu-west-1:123456789012:key/11111111-2222-3333-4444-555555555555';
const TOPIC = 'arn:aws:sns:eu-west-1:123456789012:topic';

/** The construct and the values of the template's parameters that say the same. */
function deploy(buckets, subnets, { kms, ...props } = {}) {
  const stack = new Stack(new App({ analyticsReporting: false, outdir: process.env.CDK_OUTDIR }), 'Stack');
  const vpc = Vpc.fromVpcAttributes(stack, 'Vpc', {
    vpcId: 'vpc-12345678', availabilityZones: subnets.map((_, index) => `zone${index}`), privateSubnetIds: subnets,
  });
  new ClipImagePipeline(stack, 'Clip', {
    vpc,
    sources: buckets.map((name) => Bucket.fromBucketName(stack, name, name)),
    modelBundle: { bucket: Bucket.fromBucketName(stack, 'Models', 'models') },
    kmsKey: kms && Key.fromKeyArn(stack, 'Key', kms),
    ...props,
  });
  return stack.node.root.synth().getStackByName('Stack').template;
}

const OWN = /^ClipPipelineTemplate(.+)[0-9A-F]{8}$/;

/** Both deployments, resource by resource, without what may differ. */
function both(values, buckets, subnets, props) {
  const template = deploy(buckets, subnets, { parameters: { ImageReference: ':latest' }, ...props });
  const all = evaluate(template, {}, (id) => OWN.exec(id)?.[1] ?? id);
  const cdk = Object.fromEntries(Object.entries(template.Resources).map(([id]) => OWN.exec(id)?.[1]).filter(Boolean).map((name) => [name, all[name]]));
  const sam = evaluate(TEMPLATE, {
    VpcId: 'vpc-12345678', ModelBucket: 'models',
    ...Object.fromEntries(buckets.map((name, index) => [`SourceBucket${index + 1}`, name])),
    ...Object.fromEntries(subnets.map((id, index) => [`PrivateSubnet${index + 1}`, id])),
    ...values,
  });
  for (const resources of [cdk, sam]) {
    // Where the programs lie.
    for (const { Type, Properties } of Object.values(resources)) {
      if (Type === 'AWS::Lambda::Function' && !Properties.Code.ZipFile) delete Properties.Code;
      if (Type === 'AWS::Lambda::LayerVersion') delete Properties.Content;
    }
  }
  const others = Object.keys(template.Resources).filter((id) => !OWN.test(id)).map((id) => template.Resources[id].Type).sort();
  // A stack may have two of the construct.
  const own = JSON.parse(JSON.stringify(sam).replaceAll('<AWS::StackName>', '<AWS::StackName>-Clip'));
  return { cdk, sam: own, others };
}

describe('the construct deploys what the template says', () => {
  const handler = ['AWS::IAM::Policy', 'AWS::IAM::Role', 'AWS::Lambda::Function', 'Custom::S3BucketNotifications'];

  test('with defaults', () => {
    const { cdk, sam, others } = both({}, ['images'], ['subnet-11111111']);
    assert.deepEqual(cdk, sam);
    assert.deepEqual(others, handler, 'the buckets’ events, which a user of SAM turns on by hand');
  });

  test('with everything', () => {
    const parameters = {
      ImageReference: ':latest', SourceTopicArn: TOPIC, NotificationTopicArn: TOPIC, SourceKmsKeyArn: KEY,
      NotificationQueueArn: TOPIC.replace('sns', 'sqs'), Purchase3: 'spot', ReserveScalerConcurrency: 'false', TaskMemoryMiB: 30000,
    };
    const { cdk, sam, others } = both(
      { ...parameters, KmsKeyArn: KEY, SourcePrefix: 'photos/', RetentionDays: 3, ModelName: 'ViT-L/14', ModelPrefix: 'clip-models/ViT-L-14',
        MaxInstances: 9, MinInstances: 2, OutputKind: 'topic+event-bus+queue', AlarmTopicArn: TOPIC, AlarmEmail: 'a@b.c', Decode: 'fast', ExtractLabels: 'false' },
      ['one', 'two', 'three'], ['subnet-11111111', 'subnet-22222222', 'subnet-33333333'],
      { parameters, kms: KEY, sourcePrefix: 'photos/', vectorRetention: { toDays: () => 3 }, model: 'ViT-L/14', maxInstances: 9, minInstances: 2,
        outputs: ['queue', 'topic', 'event-bus'], decode: 'fast', labelExtraction: false,
        alarmTopic: Topic.fromTopicArn(new Stack(), 'Topic', TOPIC), alarmEmail: 'a@b.c' });
    assert.deepEqual(cdk, sam);
    assert.equal(others.filter((type) => type === 'Custom::S3BucketNotifications').length, 3);
  });

  test('with vectors for ever, or for longer than messages live', () => {
    for (const [vectorRetention, VectorRetentionDays] of [['forever', '0'], [{ toDays: () => 90 }, '90']]) {
      const { cdk, sam } = both({ VectorRetentionDays }, ['images'], ['subnet-11111111'], { vectorRetention });
      assert.deepEqual(cdk, sam);
    }
  });

  test('with the express lane', () => {
    const { cdk, sam } = both({ ExpressLane: 'on' }, ['images'], ['subnet-11111111'], { parameters: { ImageReference: ':latest', ExpressLane: 'on' } });
    assert.deepEqual(cdk, sam);
    assert.ok(cdk.OnnxRuntimeLayer);
  });

  test('with a bucket of the user’s', () => {
    const { cdk, sam } = both({ CacheBucketName: 'vectors' }, ['images'], ['subnet-11111111'],
      { cacheBucket: Bucket.fromBucketName(new Stack(), 'Vectors', 'vectors') });
    assert.deepEqual(cdk, sam);
    assert.ok(!cdk.CacheBucket);
  });

  test('with one instance type and one output', () => {
    const { cdk, sam } = both({ InstanceType1: 'g6.xlarge', Purchase1: 'spot', InstanceType2: '', InstanceType3: '', OutputKind: 'event-bus' },
      ['images'], ['subnet-11111111'], { capacity: [{ instanceType: 'g6.xlarge', spot: true }], outputs: ['event-bus'] });
    assert.deepEqual(cdk, sam);
    assert.ok(!cdk.AutoScalingGroup2);
  });
});

describe('every parameter of the template can be given', () => {
  const types = readFileSync(new URL('../dist/parameters.d.ts', import.meta.url), 'utf8');
  for (const [name, { Description }] of Object.entries(TEMPLATE.Parameters)) {
    test(name, () => {
      assert.match(types, new RegExp(`readonly ${name}\\?: `));
      assert.ok(types.includes(Description.trim()));
    });
  }
});

describe('specialising a template', () => {
  const parameter = (more) => ({ Type: 'String', ...more });
  let template;
  before(() => {
    template = {
      Parameters: { Name: parameter({ Default: 'n' }), Key: parameter({ Default: '' }), Days: { Type: 'Number', Default: 2, MaxValue: 9 },
        Kind: parameter({ Default: 'a', AllowedValues: ['a', 'b'] }), Id: parameter({ Default: 'x1', AllowedPattern: '[a-z]+[0-9]', ConstraintDescription: 'a letter and a digit' }),
        Ami: { Type: 'AWS::SSM::Parameter::Value<AWS::EC2::Image::Id>', Default: '/ami' } },
      Mappings: { Seconds: { 2: { Of: 172800 } } },
      Conditions: { HasKey: { 'Fn::Not': [{ 'Fn::Equals': [{ Ref: 'Key' }, ''] }] }, IsB: { 'Fn::Equals': [{ Ref: 'Kind' }, 'b'] } },
      Rules: { Few: { Assertions: [{ Assert: { 'Fn::Contains': [['1', '2', '3'], { Ref: 'Days' }] }, AssertDescription: 'few days' }] } },
      Resources: {
        Queue: { Type: 'Q', Properties: { Key: { 'Fn::If': ['HasKey', { Ref: 'Key' }, { Ref: 'AWS::NoValue' }] }, Time: { 'Fn::FindInMap': ['Seconds', { Ref: 'Days' }, 'Of'] } } },
        OnlyB: { Type: 'B', Condition: 'IsB', Properties: {} },
        User: { Type: 'U', DependsOn: ['Queue', 'OnlyB'], Properties: { Ami: { Ref: 'Ami' }, Arn: { 'Fn::GetAtt': ['Queue', 'Arn'] }, Path: { 'Fn::Sub': '${Queue.Arn}/${Name}/${AWS::Region}' } } },
      },
    };
  });

  test('leaves nothing to choose', () => {
    const { template: { Resources, Parameters }, parameters } = specialise(template, {}, {});
    assert.deepEqual(Resources, {
      Queue: { Type: 'Q', Properties: { Time: 172800 } },
      User: { Type: 'U', DependsOn: ['Queue'], Properties: { Ami: { Ref: 'Ami' }, Arn: { 'Fn::GetAtt': ['Queue', 'Arn'] }, Path: { 'Fn::Sub': '${Queue.Arn}/n/${AWS::Region}' } } },
    });
    assert.deepEqual(Object.keys(Parameters), ['Ami']);
    assert.deepEqual(parameters, {});
  });

  test('puts something else in the place of a resource', () => {
    const { template: { Resources }, parameters } = specialise(template, {}, { Queue: { Arn: 'arn:q' } });
    assert.deepEqual(Resources.User, { Type: 'U', Properties: { Ami: { Ref: 'Ami' }, Arn: { Ref: 'QueueArn' }, Path: { 'Fn::Sub': ['${QueueArn}/n/${AWS::Region}', { QueueArn: { Ref: 'QueueArn' } }] } } });
    assert.deepEqual(parameters, { QueueArn: 'arn:q' });
    assert.throws(() => specialise(template, {}, { Queue: {} }), /the template uses Arn of Queue, for which nothing is given/);
  });

  test('takes a token for something that is there, and asks no more of it', () => {
    const key = Token.asString({ resolve: () => Aws.REGION });
    const { template: { Resources }, parameters } = specialise(template, { Key: key }, {});
    assert.deepEqual(Resources.Queue.Properties.Key, { Ref: 'Key' });
    assert.equal(parameters.Key, key);
    assert.throws(() => specialise(template, { Kind: key }, {}), /must be decided at synthesis/);
  });

  test('calls the stack as it is told', () => {
    template.Resources.User.Properties = { Name: { Ref: 'AWS::StackName' }, Path: { 'Fn::Sub': '${AWS::StackName}-${Name}' } };
    const { template: { Resources } } = specialise(template, {}, {}, [], '${AWS::StackName}-Clip');
    assert.deepEqual(Resources.User.Properties, { Name: { 'Fn::Sub': '${AWS::StackName}-Clip' }, Path: { 'Fn::Sub': '${AWS::StackName}-Clip-n' } });
  });

  test('holds values against the template’s rules', () => {
    for (const [values, says] of [
      [{ Days: 10 }, /Days is 10, but must be at most 9/],
      [{ Days: 4 }, /few days/],
      [{ Days: 'many' }, /Days is "many", but must be a number/],
      [{ Kind: 'c' }, /Kind is "c", but must be one of a, b/],
      [{ Id: '1' }, /Id is "1", but must be a letter and a digit/],
      [{ Unknown: 1 }, /no parameter Unknown/],
    ]) assert.throws(() => specialise(template, values, {}), says);
    delete template.Parameters.Name.Default;
    assert.throws(() => specialise(template, {}, {}), /Name is needed/);
  });
});
