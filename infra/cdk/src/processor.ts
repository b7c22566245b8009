import { ComputeType } from '@project-lakechain/core/compute-type';
import { ConditionalStatement, when } from '@project-lakechain/core/dsl/vocabulary/conditions';
import { Middleware, MiddlewareBuilder, MiddlewareProps } from '@project-lakechain/core/middleware';
import { ServiceDescription } from '@project-lakechain/core/service';
import { Duration } from 'aws-cdk-lib';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as iam from 'aws-cdk-lib/aws-iam';
import * as lambda from 'aws-cdk-lib/aws-lambda';
import * as s3 from 'aws-cdk-lib/aws-s3';
import * as sns from 'aws-cdk-lib/aws-sns';
import * as sqs from 'aws-cdk-lib/aws-sqs';
import { Construct } from 'constructs';
import { ClipArtifacts, VERSION } from './artifacts';
import { CACHE_PREFIX, Deployment } from './deployment';
import { ClipModel } from './model';
import { TemplateParameters } from './parameters';
import { CapacityOption, ClipSettings, days, ModelBundle, numbered, OutputKind, Retention, TEMPLATE } from './settings';
import { Substitutes } from './template';

const description: ServiceDescription = {
  // Lakechain grants a middleware the folder of its name in the cache.
  name: CACHE_PREFIX,
  description: 'CLIP embeddings for images, on GPU instances that exist only while there is work.',
  version: VERSION,
  attrs: {},
};

export interface ClipImageProcessorProps extends MiddlewareProps, ClipSettings {
  /**
   * Take `document-deleted` from sources without a condition too, and delete their vectors.
   * @default false, as upstream
   */
  readonly deletedDocuments?: boolean;
  /**
   * Vectors live at least this long: raises the expiration of everything in the cache storage.
   * @default as long as the cache storage keeps anything, 1 day
   */
  readonly vectorRetention?: Retention;
}

type Own = Omit<ClipImageProcessorProps, keyof MiddlewareProps>;

class ClipImageProcessorBuilder extends MiddlewareBuilder {
  private readonly own: { -readonly [K in keyof Own]: Own[K] } = {};

  /** Takes documents from `source`: those that meet the condition, of images, or else every image that is created. */
  public override withSource(source: Middleware, condition?: ConditionalStatement): this {
    if (condition) this.props.conditionals.set(source.node.path, condition);
    return super.withSource(source);
  }

  /** Announces finished documents to `consumer`: those that meet the condition, or else what it asks for itself. */
  public override withConsumer(consumer: Middleware, condition?: ConditionalStatement): this {
    if (condition) this.props.conditionals.set(consumer.node.path, condition);
    return super.withConsumer(consumer);
  }

  /**
   * The CLIP model.
   * @default ClipModel.VIT_B_32
   */
  public withModel(model: ClipModel): this { return this.set('model', model); }

  /**
   * Never more GPU instances than this.
   * @default 5
   */
  public withMaxInstances(instances: number): this { return this.set('maxInstances', instances); }

  /**
   * Put the five best labels into the event's keywords.
   * @default true
   */
  public withLabelExtraction(extract: boolean): this { return this.set('labelExtraction', extract); }

  /** @see ClipSettings.modelBundle */
  public withModelBundle(bundle: ModelBundle): this { return this.set('modelBundle', bundle); }
  /** @see ClipSettings.minInstances */
  public withMinInstances(instances: number): this { return this.set('minInstances', instances); }
  /** @see ClipSettings.capacity */
  public withCapacity(...options: CapacityOption[]): this { return this.set('capacity', options); }
  /** @see ClipSettings.decode */
  public withDecode(mode: 'exact' | 'fast'): this { return this.set('decode', mode); }
  /** @see ClipSettings.idleGrace */
  public withIdleGrace(time: Duration): this { return this.set('idleGrace', time); }
  /** @see ClipSettings.targetDrain */
  public withTargetDrain(time: Duration): this { return this.set('targetDrain', time); }
  /** Further places where finished documents are announced, besides the topic, which Lakechain needs. */
  public withOutputs(...kinds: OutputKind[]): this { return this.set('outputs', ['topic', ...kinds]); }
  /** @see ClipSettings.alarmTopic */
  public withAlarmTopic(topic: sns.ITopic): this { return this.set('alarmTopic', topic); }
  /** @see ClipSettings.alarmEmail */
  public withAlarmEmail(address: string): this { return this.set('alarmEmail', address); }
  /** @see ClipImageProcessorProps.vectorRetention */
  public withVectorRetention(time: Retention): this { return this.set('vectorRetention', time); }
  /** @see ClipImageProcessorProps.deletedDocuments */
  public withDeletedDocuments(take = true): this { return this.set('deletedDocuments', take); }
  /** @see ClipSettings.artifacts */
  public withArtifacts(artifacts: ClipArtifacts): this { return this.set('artifacts', artifacts); }
  /** @see ClipSettings.vpcSubnets */
  public withVpcSubnets(subnets: ec2.SubnetSelection): this { return this.set('vpcSubnets', subnets); }
  /** @see ClipSettings.parameters */
  public withParameters(parameters: TemplateParameters): this {
    return this.set('parameters', { ...this.own.parameters, ...parameters });
  }

  public build(): ClipImageProcessor {
    return new ClipImageProcessor(this.scope, this.identifier, { ...this.props, ...this.own });
  }

  private set<K extends keyof Own>(key: K, value: Own[K]): this {
    this.own[key] = value;
    return this;
  }
}

/** The drop-in for Lakechain's CLIP middleware. */
export class ClipImageProcessor extends Middleware {
  public static readonly Builder = ClipImageProcessorBuilder;

  /** Turns other forms of work (S3, EventBridge, pipes) into CloudEvents. */
  public readonly intake: lambda.IFunction;
  public readonly scaler: lambda.IFunction;
  /** The resources of `infra/template.yaml`, by their names there. */
  public readonly deployment: Deployment;
  private readonly documents: readonly string[];

  constructor(scope: Construct, id: string, private readonly settings: ClipImageProcessorProps) {
    const visibility = settings.queueVisibilityTimeout
      ?? Duration.seconds(Number(TEMPLATE.Parameters.VisibilityTimeoutSeconds!.Default));
    super(scope, id, description, {
      ...settings,
      // Without it, the queue would have SQS's 30 seconds.
      queueVisibilityTimeout: visibility,
      // Connected below, since core keys every condition alike.
      sources: new Set(),
      destinations: new Set(),
      conditionals: new Map(),
    });
    const { vpc, cacheStorage } = settings;
    if (!vpc) throw new Error('A VPC is required by the Clip processor. See withVpc().');
    if ((settings.parameters?.ExpressLane ?? 'off') !== 'off') {
      throw new Error('ExpressLane needs a queue that hands on to the GPUs what it cannot do: use ClipImagePipeline');
    }
    this.documents = ['document-created', ...(settings.deletedDocuments ? ['document-deleted'] : [])];
    const cache = cacheStorage.getBucket();
    const [firstSource, ...otherSources] = numbered('SourceBucket');

    this.deployment = new Deployment(this, 'Pipeline', {
      ...settings,
      vpc,
      values: {
        // Documents come from the sources, which grant their own buckets, or lie in the cache.
        SourceEvents: 'None',
        [firstSource!]: cache.bucketName,
        CacheBucketName: cache.bucketName,
        ...Object.fromEntries(otherSources.map((name) => [name, ''])),
        VisibilityTimeoutSeconds: visibility.toSeconds(),
        TaskMemoryMiB: settings.maxMemorySize,
        ContainerInsights: settings.cloudWatchInsights ? 'enabled' : 'disabled',
      },
      substitutes: {
        InputQueue: queue(this.eventQueue),
        DeadLetterQueue: queue(this.deadLetterQueue),
        OutputTopic: { Ref: this.eventBus.topicArn, TopicName: this.eventBus.topicName },
        ...this.oneLogGroup(),
      },
      // Their policies are Lakechain's; S3 does not invoke intake for objects in the cache.
      leftOut: ['InputQueuePolicy', 'DeadLetterQueuePolicy', 'OutputTopicPolicy', `${firstSource}Permission`],
    });
    this.intake = this.deployment.intake;
    this.scaler = this.deployment.scaler;
    cacheStorage.kmsKey()?.grantEncryptDecrypt(this.intake.role!);
    if (settings.vectorRetention) keepFor(cache, settings.vectorRetention);

    this.grantPrincipal = this.deployment.taskRole.grantPrincipal;
    super.bind();
    for (const source of settings.sources) source.pipe(this, this.conditionFor(source));
    for (const consumer of settings.destinations) this.pipe(consumer, this.conditionFor(consumer));
  }

  /** Images that are created, or deleted too if that was asked for. */
  public override conditional(): ConditionalStatement {
    return super.conditional().and(when('type').includes(...this.documents));
  }

  public supportedInputTypes(): string[] {
    const { FilterPolicy } = TEMPLATE.Resources.SourceSubscription!.Properties as
      { FilterPolicy: { data: { document: { type: string[] } } } };
    return [...FilterPolicy.data.document.type];
  }

  public supportedOutputTypes(): string[] { return this.supportedInputTypes(); }

  public supportedComputeTypes(): ComputeType[] { return [ComputeType.GPU]; }

  /** Documents pass through unchanged, so they are read where the sources have them. */
  public grantReadProcessedDocuments(grantee: iam.IGrantable): iam.Grant {
    for (const source of this.sources) source.grantReadProcessedDocuments(grantee);
    return {} as iam.Grant;
  }

  /** Lets somebody read the vectors. */
  public grantReadVectors(grantee: iam.IGrantable): iam.Grant {
    return this.settings.cacheStorage.getBucket().grantRead(grantee, `${CACHE_PREFIX}/*`);
  }

  /** A copy: core adds the consumer's types to it, and the user may give it to several. */
  private conditionFor(other: Middleware): ConditionalStatement | undefined {
    const condition = this.settings.conditionals.get(other.node.path);
    return condition && new ConditionalStatement(structuredClone(condition.value()), condition.subject());
  }

  /** Lakechain has one log group for everything in a middleware. */
  private oneLogGroup(): Substitutes {
    const { logGroupName: Ref, logGroupArn: Arn } = this.logGroup;
    return Object.fromEntries(Object.entries(TEMPLATE.Resources)
      .filter(([, { Type }]) => Type === 'AWS::Logs::LogGroup')
      .map(([name]) => [name, { Ref, Arn }]));
  }
}

function queue({ queueUrl, queueArn, queueName }: sqs.IQueue): Substitutes[string] {
  return { Ref: queueUrl, Arn: queueArn, QueueName: queueName };
}

const kept = new WeakMap<s3.CfnBucket, number>();

/** Of two rules S3 takes the shorter one, so the cache's own has to give way; of several wishes the longest counts. */
function keepFor(cache: s3.IBucket, time: Retention): void {
  const bucket = cache.node.defaultChild;
  if (!(bucket instanceof s3.CfnBucket)) throw new Error('withVectorRetention() needs a cache storage of this app');
  const longest = Math.max(days(time), kept.get(bucket) ?? 1);
  kept.set(bucket, longest);
  const expiration = 'LifecycleConfiguration.Rules.0.ExpirationInDays';
  if (longest === Infinity) bucket.addPropertyDeletionOverride(expiration);
  else bucket.addPropertyOverride(expiration, longest);
}
