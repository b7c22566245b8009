// Pipelines with Lakechain; prints their templates and what can only be asked of objects.
import * as cdk from 'aws-cdk-lib';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as kms from 'aws-cdk-lib/aws-kms';
import * as logs from 'aws-cdk-lib/aws-logs';
import * as sns from 'aws-cdk-lib/aws-sns';
import { CacheStorage, ComputeType, Middleware, when } from '@project-lakechain/core';
import { ClipImagePipeline, ClipImageProcessor, ClipModel } from 'clip-image-processor';
import { trigger, VectorStore } from './middlewares';
import * as page from './page';

const app = new cdk.App({ analyticsReporting: false });
const facts: { [name: string]: unknown } = {};

function stack(name: string): { scope: cdk.Stack; cache: CacheStorage; vpc: ec2.Vpc } {
  const scope = new cdk.Stack(app, name);
  return { scope, cache: new CacheStorage(scope, 'Cache'), vpc: new ec2.Vpc(scope, 'Vpc', {}) };
}

function attempt(action: () => unknown): string {
  try {
    action();
    return 'no error';
  } catch (error) {
    return String(error);
  }
}

page.stacks(app);

{ // S3 trigger → CLIP → vector store
  const { scope, cache, vpc } = stack('Chain');
  const source = trigger(scope, cache);
  const clip = new ClipImageProcessor.Builder()
    .withScope(scope).withIdentifier('Clip').withCacheStorage(cache).withVpc(vpc).withSource(source).build();
  const store = new VectorStore.Builder()
    .withScope(scope).withIdentifier('Store').withCacheStorage(cache).withSource(clip).build();
  const middleware: Middleware = clip;
  const heard: string[] = [];
  clip.on('source-added', (other: Middleware) => heard.push(`source ${other.node.id}`));
  clip.on('consumer-added', (other: Middleware) => heard.push(`consumer ${other.node.id}`));
  facts.chain = {
    name: middleware.name(),
    description: clip.serviceDescription(),
    inputs: clip.supportedInputTypes(),
    outputs: clip.supportedOutputTypes(),
    compute: clip.supportedComputeTypes(),
    condition: clip.conditional().value(),
    sources: [...clip.getSources()].map((other) => other.node.id),
    consumers: [...clip.getConsumers()].map((other) => other.node.id),
    metrics: [
      clip.metricInFlightMessages(), clip.metricDeadLetterQueueMessages(), clip.metricPublishedMessages(),
      clip.metricDeliveredMessages(), clip.metricFailedMessages(),
    ].map((metric) => metric.metricName),
    input: clip.getInput() === clip.getQueue(),
    heard,
  };
  clip.grantReadVectors(store.grantPrincipal);
  clip.getDeadLetterQueue().grantConsumeMessages(store.grantPrincipal);
  clip.getEventBus().grantPublish(store.grantPrincipal);
  clip.getLogGroup().grantWrite(store.grantPrincipal);
}

{ // two sources, each with a condition of its own, one without, and a consumer with one
  const { scope, cache, vpc } = stack('Conditions');
  const [small, photos, all] = ['Small', 'Photos', 'All'].map((id) => trigger(scope, cache, id));
  const little = when('data.document.size').lt(1000);
  const store = new VectorStore.Builder().withScope(scope).withIdentifier('Store').withCacheStorage(cache).build();
  new ClipImageProcessor.Builder()
    .withScope(scope).withIdentifier('Clip').withCacheStorage(cache).withVpc(vpc)
    .withSource(small!, little)
    .withSource(photos!, when('data.document.type').equals('image/jpeg'))
    .withSource(all!)
    .withConsumer(store)
    .build();
  new ClipImageProcessor.Builder()
    .withScope(scope).withIdentifier('Deletions').withCacheStorage(cache).withVpc(vpc)
    .withSources([all!])
    .withDeletedDocuments()
    .withConsumers([new VectorStore.Builder().withScope(scope).withIdentifier('Other').withCacheStorage(cache).build()])
    .build();
  facts.conditionAfterwards = little.value();
}

{ // two models, one cache
  const { scope, cache, vpc } = stack('Models');
  const source = trigger(scope, cache);
  for (const model of [ClipModel.VIT_B_32, ClipModel.VIT_L_14]) {
    new ClipImageProcessor.Builder()
      .withScope(scope).withIdentifier(model.replace('/', '-')).withCacheStorage(cache).withVpc(vpc)
      .withSource(source).withModel(model)
      .withVectorRetention(model === ClipModel.VIT_B_32 ? 'forever' : cdk.Duration.days(9)).build();
  }
}

{ // every method
  const scope = new cdk.Stack(app, 'Everything');
  const key = new kms.Key(scope, 'Key');
  const cache = new CacheStorage(scope, 'Cache', { encryptionKey: key });
  const vpc = new ec2.Vpc(scope, 'Vpc', { maxAzs: 3 });
  const source = trigger(scope, cache);
  const store = new VectorStore.Builder().withScope(scope).withIdentifier('Store').withCacheStorage(cache).build();
  new ClipImageProcessor.Builder()
    .withScope(scope)
    .withIdentifier('Clip')
    .withSources([source])
    .withConsumers([])
    .withConsumer(store, when('data.document.type').equals('image/png'))
    .withComputeType(ComputeType.GPU)
    .withMaxRetry(3)
    .withQueueVisibilityTimeout(cdk.Duration.minutes(10))
    .withBatchingWindow(cdk.Duration.seconds(5))
    .withBatchSize(10)
    .withMaxConcurrency(2)
    .withCloudWatchInsights(true)
    .withCacheStorage(cache)
    .withLogRetention(logs.RetentionDays.ONE_MONTH)
    .withMaxMemorySize(30000)
    .withKmsKey(key)
    .withKeyReusePeriod(cdk.Duration.minutes(10))
    .withVpc(vpc)
    .withModel(ClipModel.VIT_B_16)
    .withMaxInstances(7)
    .withLabelExtraction(false)
    .withMinInstances(1)
    .withCapacity(
      { instanceType: ec2.InstanceType.of(ec2.InstanceClass.G6, ec2.InstanceSize.XLARGE), spot: true },
      { instanceType: ec2.InstanceType.of(ec2.InstanceClass.G5, ec2.InstanceSize.XLARGE) })
    .withDecode('fast')
    .withIdleGrace(cdk.Duration.minutes(2))
    .withTargetDrain(cdk.Duration.minutes(5))
    .withOutputs('event-bus')
    .withAlarmTopic(new sns.Topic(scope, 'Alarms'))
    .withAlarmEmail('somebody@example.com')
    .withVectorRetention(cdk.Duration.days(30))
    .withVpcSubnets({ subnetType: ec2.SubnetType.PRIVATE_WITH_EGRESS, availabilityZones: vpc.availabilityZones.slice(0, 2) })
    .withParameters({ LogLevel: 'debug' })
    .withParameters({ BootSeconds: 120 })
    .build();
}

{ // mistakes
  const { scope, cache, vpc } = stack('Mistakes');
  const clip = (id: string) =>
    new ClipImageProcessor.Builder().withScope(scope).withIdentifier(id).withCacheStorage(cache).withVpc(vpc);
  facts.mistakes = {
    vpc: attempt(() => new ClipImageProcessor.Builder()
      .withScope(scope).withIdentifier('NoVpc').withCacheStorage(cache).build()),
    cache: attempt(() => new ClipImageProcessor.Builder()
      .withScope(scope).withIdentifier('NoCache').withVpc(vpc).build()),
    compute: attempt(() => clip('Compute').withComputeType(ComputeType.CPU).build()),
    instances: attempt(() => clip('Instances').withMaxInstances(0).build()),
    visibility: attempt(() => clip('Visibility').withQueueVisibilityTimeout(cdk.Duration.seconds(30)).build()),
    least: attempt(() => clip('Least').withMaxInstances(2).withMinInstances(3).build()),
  };
}

{ // the plain construct comes from the same door
  const { scope, vpc } = stack('Plain');
  facts.plain = attempt(() => new ClipImagePipeline(scope, 'Clip', { vpc, sources: [] }));
}

const assembly = app.synth();
const templates = Object.fromEntries(assembly.stacks.map(({ stackName, template }) => [stackName, template]));
// core emits its events on the next turn.
setImmediate(() => setImmediate(() => process.stdout.write(JSON.stringify({ templates, facts }))));
