import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { App, Stack } from 'aws-cdk-lib';
import { Vpc } from 'aws-cdk-lib/aws-ec2';
import { Bucket } from 'aws-cdk-lib/aws-s3';
import { Artifacts, ClipImagePipeline } from 'clip-image-processor/pipeline';
import { ROOT, scenario } from './consumer.mjs';

const of = (template, type) => Object.entries(template.Resources).filter(([, { Type }]) => Type === type);
const task = (template) => of(template, 'AWS::ECS::TaskDefinition')[0][1].Properties.ContainerDefinitions[0];
const functions = (template) => Object.fromEntries(of(template, 'AWS::Lambda::Function').map(([id, { Properties }]) => [id.replace(/^ClipPipelineTemplate(\w+)Function.*/, '$1'), Properties]));
/** Names of the functions' packages, which a checkout has built. */
const PROGRAMS = Object.values(JSON.parse(readFileSync(join(ROOT, 'dist/template.json'), 'utf8')).Resources)
  .flatMap(({ Type, Properties }) => (Type === 'AWS::Lambda::Function' && Properties.Code.S3Key) || []).map((key) => key.replace('.zip', ''));
const policies = (template, role) => JSON.stringify(of(template, 'AWS::IAM::Policy').map(([, { Properties }]) => Properties)
  .filter(({ Roles }) => Roles.some(({ Ref }) => role.test(Ref))).flatMap(({ PolicyDocument }) => PolicyDocument.Statement));

describe('without Lakechain, from an ES module', () => {
  const { templates: { Least, Most } } = scenario('none', 'plain.mts');

  test('the source’s events go to EventBridge and reach the intake function', () => {
    const [[, { Properties }]] = of(Least, 'Custom::S3BucketNotifications');
    assert.deepEqual(Properties.NotificationConfiguration, { EventBridgeConfiguration: {} });
    const rule = of(Least, 'AWS::Events::Rule').find(([id]) => /SourceEvents/.test(id))[1].Properties;
    assert.match(JSON.stringify(rule.EventPattern.detail.bucket.name), /^\[\{"Ref":"Images\w+"\}\]$/);
  });

  test('programs come from the account’s own bucket and repository', () => {
    const account = { 'Fn::Sub': 'clip-image-processor-${AWS::AccountId}-${AWS::Region}' };
    const { Intake, Scaler } = functions(Least);
    assert.deepEqual([Intake.Code, Scaler.Code].map(({ S3Key }) => S3Key), ['functions/0.1.0/intake.zip', 'functions/0.1.0/scaler.zip']);
    assert.deepEqual(Intake.Code.S3Bucket, account);
    assert.deepEqual(task(Least).Image, { 'Fn::Sub': '${AWS::AccountId}.dkr.ecr.${AWS::Region}.${AWS::URLSuffix}/clip-image-processor:0.1.0' });
    assert.deepEqual(task(Least).Environment.find(({ Name }) => Name === 'MODEL_URI').Value,
      { 'Fn::Sub': ['s3://${ModelBucket}/clip-models/ViT-B-32', { ModelBucket: account }] });
  });

  test('what others need is granted on what was made', () => {
    const allowed = policies(Least, /^Reader/);
    assert.match(allowed, /CacheBucket.*\/clip-image-processor\/\*/);
    assert.match(allowed, /"sqs:SendMessage".*ClipPipelineTemplateInputQueue/);
    assert.match(allowed, /"lambda:InvokeFunction".*ClipPipelineTemplateIntakeFunction/);
    const [[, { Properties: { TopicArn } }]] = of(Least, 'AWS::SNS::Subscription');
    assert.match(TopicArn.Ref, /^ClipPipelineTemplateOutputTopic/);
  });

  test('every alarm of the template is there to be used', () => {
    const [output] = Object.entries(Least.Outputs).filter(([id]) => id === 'Alarms').map(([, { Value }]) => Value.split(' '));
    assert.equal(output.length, of(Least, 'AWS::CloudWatch::Alarm').length);
    assert.ok(output.includes('DeadLetterAlarm'));
  });

  test('the user’s bucket, keys, programs and model are used', () => {
    assert.deepEqual(of(Most, 'AWS::S3::Bucket').map(([id]) => id.slice(0, -8)).sort(), ['Images', 'Models', 'More', 'Vectors']);
    assert.match(functions(Most).Intake.Environment.Variables.CACHE_BUCKET.Ref, /^Vectors/);
    assert.deepEqual(functions(Most).Intake.Code, { S3Bucket: { Ref: of(Most, 'AWS::S3::Bucket').find(([id]) => /^Models/.test(id))[0] }, S3Key: 'programs/intake.zip' });
    assert.equal(task(Most).Image, 'registry.example/clip:1');
    for (const role of [/TaskRole/, /IntakeRole/]) assert.match(policies(Most, role), /"kms:Decrypt","Effect":"Allow","Resource":\{"Fn::GetAtt":\["ImageKey/);
    assert.match(policies(Most, /^Reader/), /"kms:Decrypt".*"Key\w+","Arn"/);
    const [, key] = of(Most, 'AWS::KMS::Key').find(([id]) => /^Key/.test(id));
    for (const service of ['logs', 'events', 'sns', 'cloudwatch']) assert.match(JSON.stringify(key.Properties.KeyPolicy), new RegExp(`${service}\\.amazonaws\\.com`));
  });

  test('at most three zones are used, and messages live as long as the vectors', () => {
    assert.deepEqual(of(Most, 'AWS::EC2::Subnet').filter(([id]) => /Private/.test(id)).length, 4);
    for (const [, { Properties }] of of(Most, 'AWS::AutoScaling::AutoScalingGroup')) assert.equal(Properties.VPCZoneIdentifier.length, 3);
    const own = of(Most, 'AWS::SQS::Queue').map(([, { Properties }]) => Properties.MessageRetentionPeriod);
    assert.deepEqual(own, Array(4).fill(7 * 86400));
  });

  test('alarms reach the address', () => {
    const [id, { Properties }] = of(Most, 'AWS::SNS::Topic').find(([id]) => /AlarmTopic/.test(id));
    assert.deepEqual(Properties.Subscription, [{ Protocol: 'email', Endpoint: 'somebody@example.com' }]);
    for (const [, alarm] of of(Most, 'AWS::CloudWatch::Alarm')) assert.deepEqual(alarm.Properties.AlarmActions, [{ Ref: id }]);
  });
});

describe('programs from a checkout', () => {
  const folder = mkdtempSync(join(tmpdir(), 'clip-checkout-'));
  const write = (path, text) => {
    mkdirSync(join(folder, path, '..'), { recursive: true });
    writeFileSync(join(folder, path), text);
  };
  const synthesise = () => {
    const app = new App({ analyticsReporting: false, outdir: join(folder, 'cdk.out') });
    const stack = new Stack(app, 'Stack');
    new ClipImagePipeline(stack, 'Clip', {
      vpc: new Vpc(stack, 'Vpc'), sources: [new Bucket(stack, 'Images')], artifacts: Artifacts.checkout(join(folder, 'checkout')),
    });
    return app.synth();
  };
  process.on('exit', () => rmSync(folder, { recursive: true }));

  test('a function that is not built is named, with what builds it', () => {
    write('checkout/gpu-task/Dockerfile', 'FROM scratch AS cuda\n');
    assert.throws(synthesise, /target\/lambda\/intake holds no bootstrap: run `cargo lambda build --release --package intake`/);
  });

  test('functions are uploaded and the image is built at deployment', () => {
    for (const name of PROGRAMS) write(`checkout/target/lambda/${name}/bootstrap`, name);
    assert.throws(synthesise, /OnnxRuntimeLayer is not there: run `make -C infra\/image build-OnnxRuntimeLayer/);
    write('checkout/target/lambda/OnnxRuntimeLayer/lib/libonnxruntime.so', 'library');
    const { template } = synthesise().getStackByName('Stack');
    const { Intake, Scaler } = functions(template);
    assert.notEqual(Intake.Code.S3Key, Scaler.Code.S3Key);
    assert.match(Intake.Code.S3Bucket['Fn::Sub'], /^cdk-/);
    assert.match(JSON.stringify(task(template).Image), /:[0-9a-f]{64}",.*container-assets/);
    const [, { Properties }] = of(template, 'AWS::IAM::Role').find(([id]) => /TaskExecutionRole/.test(id));
    const { Resource } = Properties.Policies[0].PolicyDocument.Statement.find(({ Sid }) => Sid === 'Image');
    assert.match(JSON.stringify(Resource), /repository\/\$\{ImageRepository\}.*container-assets/, 'and may be pulled');
  });
});

test('the package holds what it needs and nothing else', () => {
  const [{ files }] = JSON.parse(execFileSync('npm', ['pack', '--dry-run', '--ignore-scripts', '--json'], { cwd: ROOT, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }));
  const modules = ['artifacts', 'deployment', 'index', 'model', 'parameters', 'pipeline', 'processor', 'settings', 'template'];
  assert.deepEqual(files.map(({ path }) => path).sort(), [
    'README.md', 'package.json', 'dist/template.json', ...modules.flatMap((name) => [`dist/${name}.d.ts`, `dist/${name}.js`]),
  ].sort());
});
