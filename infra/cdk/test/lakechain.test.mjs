import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, describe, test } from 'node:test';
import { scenario } from './consumer.mjs';

const filter = (name) => JSON.parse(readFileSync(new URL(`../../../events/filters/${name}.json`, import.meta.url), 'utf8'));
const CREATED_IMAGES = filter('subscription');
const IMAGES = CREATED_IMAGES.data.document.type;
const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'));

const of = (template, type) => Object.entries(template.Resources).filter(([, { Type }]) => Type === type);
const one = (template, type, like) => {
  const found = of(template, type).filter(([id]) => like.test(id));
  assert.equal(found.length, 1, `one ${type} like ${like}, not ${found.map(([id]) => id)}`);
  return { id: found[0][0], ...found[0][1] };
};
const environment = ({ Properties }) =>
  Object.fromEntries(Properties.ContainerDefinitions[0].Environment.map(({ Name, Value }) => [Name, Value]));
const subscriptionsTo = (template, queue) => of(template, 'AWS::SNS::Subscription').map(([, { Properties }]) => Properties)
  .filter(({ Endpoint }) => JSON.stringify(Endpoint) === JSON.stringify({ 'Fn::GetAtt': [queue, 'Arn'] }));
/** What the attached policies allow a role, as action → resources. */
const grants = (template, role) => of(template, 'AWS::IAM::Policy').map(([, { Properties }]) => Properties)
  .filter(({ Roles }) => Roles.some(({ Ref }) => role.test(Ref)))
  .flatMap(({ PolicyDocument }) => PolicyDocument.Statement);

const cores = [['contract', 'our stand-in for core']];
if (process.env.LAKECHAIN_CHECKOUT) cores.push([process.env.LAKECHAIN_CHECKOUT, 'the real core']);
else after(() => console.log('not run: infra/cdk on the real core (LAKECHAIN_CHECKOUT names no checkout of Lakechain)'));

for (const [core, called] of cores) {
  describe(`with ${called}`, () => {
    const { templates, facts } = scenario(core, 'lakechain.ts');

    test('the page’s three examples synthesise the whole system', () => {
      for (const [page, model, instances] of [
        ['Page1', 'ViT-B-32', '5'], ['Page2', 'ViT-L-14', '5'], ['Page3', 'ViT-B-32', '10'], ['Page1Large', 'ViT-L-14', '10'],
      ]) {
        const template = templates[page];
        const task = one(template, 'AWS::ECS::TaskDefinition', /TaskDefinition/);
        assert.match(JSON.stringify(environment(task).MODEL_URI), new RegExp(`clip-models/${model}`));
        const groups = of(template, 'AWS::AutoScaling::AutoScalingGroup');
        assert.deepEqual(groups.map(([, { Properties }]) => Properties.MaxSize), [instances, instances]);
        const scaler = one(template, 'AWS::Lambda::Function', /ScalerFunction/);
        assert.equal(scaler.Properties.Environment.Variables.MAX_INSTANCES, instances);
      }
    });

    test('the page’s VPC is used: its private subnets, nothing isolated', () => {
      const group = one(templates.Page1, 'AWS::AutoScaling::AutoScalingGroup', /Group1/);
      assert.match(JSON.stringify(group.Properties.VPCZoneIdentifier), /^\[\{"Ref":"VpcPrivateSubnet1\w+"\},\{"Ref":"VpcPrivateSubnet2\w+"\}\]$/);
      assert.equal(of(templates.Page1, 'AWS::EFS::MountTarget').length, 2);
    });

    test('it is a middleware', () => {
      const { description, ...rest } = facts.chain;
      assert.deepEqual({ name: description.name, version: description.version }, { name: 'clip-image-processor', version });
      assert.deepEqual(rest, {
        name: 'clip-image-processor',
        inputs: IMAGES,
        outputs: IMAGES,
        compute: ['GPU'],
        condition: CREATED_IMAGES,
        sources: ['Trigger'],
        consumers: ['Store'],
        metrics: [
          'ApproximateNumberOfMessagesVisible', 'ApproximateNumberOfMessagesVisible',
          'NumberOfMessagesPublished', 'NumberOfNotificationsDelivered', 'NumberOfNotificationsFailed',
        ],
        input: true,
        heard: ['source Trigger', 'consumer Store'],
      });
    });

    test('it hears its source as the wire contract says, and the vector store hears it', () => {
      const template = templates.Chain;
      const queue = one(template, 'AWS::SQS::Queue', /^ClipQueue/);
      const [heard, ...others] = subscriptionsTo(template, queue.id);
      assert.equal(others.length, 0);
      assert.deepEqual(heard, {
        Protocol: 'sqs',
        TopicArn: { Ref: one(template, 'AWS::SNS::Topic', /^TriggerTopic/).id },
        Endpoint: { 'Fn::GetAtt': [queue.id, 'Arn'] },
        RawMessageDelivery: true,
        FilterPolicyScope: 'MessageBody',
        FilterPolicy: CREATED_IMAGES,
      });
      const [store] = subscriptionsTo(template, one(template, 'AWS::SQS::Queue', /^StoreQueue/).id);
      assert.deepEqual(store.TopicArn, { Ref: one(template, 'AWS::SNS::Topic', /^ClipTopic/).id });
      assert.deepEqual(store.FilterPolicy, filter('vector-store'));
    });

    test('programs use Lakechain’s queues, topic, log group and cache, and make none of their own', () => {
      const template = templates.Chain;
      const task = one(template, 'AWS::ECS::TaskDefinition', /TaskDefinition/);
      const ref = (type, like) => ({ Ref: one(template, type, like).id });
      const variables = environment(task);
      assert.deepEqual(variables.INPUT_QUEUE_URL, ref('AWS::SQS::Queue', /^ClipQueue/));
      assert.deepEqual(variables.DEAD_LETTER_QUEUE_URL, ref('AWS::SQS::Queue', /^ClipDeadLetterQueue/));
      assert.deepEqual(variables.OUTPUT_TOPIC_ARN, ref('AWS::SNS::Topic', /^ClipTopic/));
      assert.deepEqual(variables.CACHE_BUCKET, ref('AWS::S3::Bucket', /^CacheStorage/));
      const group = ref('AWS::Logs::LogGroup', /^Clip/);
      for (const [, { Properties }] of of(template, 'AWS::Lambda::Function').filter(([id]) => id.startsWith('Clip'))) {
        assert.deepEqual(Properties.LoggingConfig, { LogGroup: group });
      }
      assert.deepEqual(task.Properties.ContainerDefinitions[0].LogConfiguration.Options['awslogs-group'], group);
      assert.equal(of(template, 'AWS::S3::Bucket').length, 2, 'the cache and the trigger’s images');
    });

    test('a message stays hidden for three minutes, and five attempts are made', () => {
      const { Properties } = one(templates.Chain, 'AWS::SQS::Queue', /^ClipQueue/);
      assert.equal(Properties.VisibilityTimeout, 180);
      assert.equal(Properties.RedrivePolicy.maxReceiveCount, 5);
    });

    test('the task may read its source and the cache, and write its folder there', () => {
      const allowed = JSON.stringify(grants(templates.Chain, /^ClipPipelineTemplateTaskRole/));
      assert.match(allowed, /"TriggerImages\w+","Arn"/);
      assert.match(allowed, /"s3:PutObject".*\/clip-image-processor\/\*/);
    });

    test('the vector store may read the images and the vectors', () => {
      const allowed = JSON.stringify(grants(templates.Chain, /^StoreRole/));
      assert.match(allowed, /"TriggerImages\w+","Arn"/);
      assert.match(allowed, /"CacheStorage\w+","Arn"/);
    });

    test('SSM says where it is, and everything is tagged', () => {
      const names = of(templates.Chain, 'AWS::SSM::Parameter').filter(([id]) => id.startsWith('Clip'))
        .map(([, { Properties }]) => Properties.Name.replace(/^\/services\/c[0-9a-f]+/, ''));
      assert.deepEqual(names.sort(), ['description', 'event-bus/arn', 'input-queue/url', 'log-group/name']
        .map((key) => `/clip-image-processor/${version}/${key}`));
      const { Properties } = one(templates.Chain, 'AWS::Lambda::Function', /^ClipPipelineTemplateScaler/);
      assert.deepEqual(Properties.Tags.filter(({ Key }) => ['Context', 'Service', 'Version'].includes(Key)), [
        { Key: 'Context', Value: 'project-lakechain' },
        { Key: 'Service', Value: 'clip-image-processor' },
        { Key: 'Version', Value: version },
      ]);
    });

    test('each source keeps its own condition; one with a condition hands over deletions too', () => {
      const template = templates.Conditions;
      const heard = subscriptionsTo(template, one(template, 'AWS::SQS::Queue', /^ClipQueue/).id);
      const from = (name) => heard.find(({ TopicArn }) => TopicArn.Ref.startsWith(`${name}Topic`)).FilterPolicy;
      assert.deepEqual(from('Small'), { data: { document: { size: [{ numeric: ['<', 1000] }], type: IMAGES } } });
      assert.deepEqual(from('Photos'), { data: { document: { type: ['image/jpeg'] } } });
      assert.deepEqual(from('All'), CREATED_IMAGES);
      assert.equal(heard.length, 3);
      const [store] = subscriptionsTo(template, one(template, 'AWS::SQS::Queue', /^StoreQueue/).id);
      assert.deepEqual(store.FilterPolicy, filter('vector-store'));
      assert.deepEqual(facts.conditionAfterwards, { data: { document: { size: [{ numeric: ['<', 1000] }] } } }, 'and stays as the user made it');
    });

    test('deletions are taken without a condition if asked for', () => {
      const template = templates.Conditions;
      const [heard] = subscriptionsTo(template, one(template, 'AWS::SQS::Queue', /^DeletionsQueue/).id);
      assert.deepEqual(heard.FilterPolicy, { ...CREATED_IMAGES, type: ['document-created', 'document-deleted'] });
    });

    test('two models in one stack share the cache and nothing else', () => {
      const template = templates.Models;
      const tasks = of(template, 'AWS::ECS::TaskDefinition').map(([, task]) => environment(task));
      assert.deepEqual(tasks.map(({ CACHE_BUCKET }) => CACHE_BUCKET), Array(2).fill({ Ref: one(template, 'AWS::S3::Bucket', /^Cache/).id }));
      const { LifecycleConfiguration: { Rules } } = one(template, 'AWS::S3::Bucket', /^Cache/).Properties;
      assert.ok(Rules[0].Status === 'Enabled' && !('ExpirationInDays' in Rules[0]), 'and one’s vectors live for ever, which is the longer wish');
      assert.notDeepEqual(tasks[0].INPUT_QUEUE_URL, tasks[1].INPUT_QUEUE_URL);
      assert.deepEqual(of(template, 'AWS::Lambda::Function').filter(([id]) => /Intake/.test(id))
        .map(([, { Properties }]) => Properties.Environment.Variables.MODEL_NAME), ['ViT-B/32', 'ViT-L/14']);
      const [first, second] = ['ViTB32', 'ViTL14'].map((id) => Object.entries(template.Resources).filter(([name]) => name.startsWith(id)));
      // A policy's name is its role's.
      const names = (resources) => resources.filter(([, { Type }]) => Type !== 'AWS::IAM::Policy').flatMap(([, { Type, Properties = {} }]) => Object.entries(Properties)
        .filter(([key]) => ['Name', 'Family', `${Type.split('::')[2]}Name`].includes(key)).map(([, name]) => JSON.stringify(name)));
      assert.ok(names(first).length > 4);
      assert.deepEqual(names(first).filter((name) => names(second).includes(name)), [], 'no physical name is given twice');
    });

    test('every method is heard', () => {
      const template = templates.Everything;
      const key = { 'Fn::GetAtt': [one(template, 'AWS::KMS::Key', /^Key/).id, 'Arn'] };
      const queue = one(template, 'AWS::SQS::Queue', /^ClipQueue/).Properties;
      assert.deepEqual([queue.VisibilityTimeout, queue.RedrivePolicy.maxReceiveCount, queue.KmsDataKeyReusePeriodSeconds], [600, 3, 600]);
      assert.deepEqual(one(template, 'AWS::SQS::Queue', /IntakeFailureQueue/).Properties.KmsMasterKeyId, key);
      assert.deepEqual(one(template, 'AWS::EFS::FileSystem', /Model/).Properties.KmsKeyId, key);
      assert.deepEqual(one(template, 'AWS::Lambda::Function', /ScalerFunction/).Properties.KmsKeyArn, key);
      const task = one(template, 'AWS::ECS::TaskDefinition', /TaskDefinition/);
      assert.equal(task.Properties.ContainerDefinitions[0].Memory, 30000);
      const variables = environment(task);
      assert.deepEqual(
        [variables.VISIBILITY_TIMEOUT_SECONDS, variables.EXTRACT_LABELS, variables.DECODE, variables.IDLE_EXIT_SECONDS,
          variables.OUTPUT_EVENT_BUS, variables.OUTPUT_QUEUE_URL, variables.RUST_LOG],
        ['600', 'false', 'fast', '120', 'default', '', 'debug']);
      const scaler = one(template, 'AWS::Lambda::Function', /ScalerFunction/).Properties.Environment.Variables;
      assert.deepEqual([scaler.MAX_INSTANCES, scaler.MIN_INSTANCES, scaler.IDLE_GRACE_SECONDS, scaler.TARGET_DRAIN_SECONDS, scaler.BOOT_SECONDS],
        ['7', '1', '120', '300', '120']);
      const groups = of(template, 'AWS::AutoScaling::AutoScalingGroup').map(([, { Properties }]) => Properties);
      assert.deepEqual(groups.map(({ MixedInstancesPolicy: { InstancesDistribution, LaunchTemplate } }) =>
        [LaunchTemplate.Overrides[0].InstanceType, InstancesDistribution.OnDemandPercentageAboveBaseCapacity]),
      [['g6.xlarge', 0], ['g5.xlarge', 100]]);
      assert.equal(groups[0].VPCZoneIdentifier.length, 2);
      assert.equal(one(template, 'AWS::ECS::Cluster', /Cluster/).Properties.ClusterSettings[0].Value, 'enabled');
      assert.equal(one(template, 'AWS::Logs::LogGroup', /^ClipLog/).Properties.RetentionInDays, 30);
      assert.equal(one(template, 'AWS::S3::Bucket', /^Cache/).Properties.LifecycleConfiguration.Rules[0].ExpirationInDays, 30);
      for (const [, { Properties }] of of(template, 'AWS::CloudWatch::Alarm')) {
        assert.deepEqual(Properties.AlarmActions, [/^Alarms/, /AlarmTopic/].map((like) => ({ Ref: one(template, 'AWS::SNS::Topic', like).id })));
      }
      const [store] = subscriptionsTo(template, one(template, 'AWS::SQS::Queue', /^StoreQueue/).id);
      assert.deepEqual(store.FilterPolicy, { data: { document: { type: ['image/png'] } } });
    });

    test('the key’s policy lets instances have encrypted volumes', () => {
      const { Statement } = one(templates.Everything, 'AWS::KMS::Key', /^Key/).Properties.KeyPolicy;
      const grant = Statement.find(({ Action }) => Action === 'kms:CreateGrant');
      assert.deepEqual(grant.Condition.Bool, { 'kms:GrantIsForAWSResource': true });
      assert.match(JSON.stringify(grant.Condition.ArnLike), /AWSServiceRoleForAutoScaling\*/);
      assert.deepEqual(grant.Condition.StringEquals, { 'kms:CallerAccount': { Ref: 'AWS::AccountId' } });
    });

    test('mistakes are named', () => {
      const { vpc, cache, compute, instances, least, visibility } = facts.mistakes;
      assert.match(vpc, /VPC is required/);
      assert.match(cache, /cache storage/);
      assert.match(compute, /CPU/);
      assert.match(instances, /MaxInstances is 0, but must be at least 1/);
      assert.match(visibility, /VisibilityTimeoutSeconds is 30, but must be at least 130/);
      assert.match(least, /MinInstances must not be above MaxInstances \(2\)/);
      assert.match(facts.plain, /sources needs at least one bucket/);
    });
  });
}
