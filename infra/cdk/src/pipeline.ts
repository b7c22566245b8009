import { Aws } from 'aws-cdk-lib';
import * as cloudwatch from 'aws-cdk-lib/aws-cloudwatch';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as iam from 'aws-cdk-lib/aws-iam';
import * as kms from 'aws-cdk-lib/aws-kms';
import * as lambda from 'aws-cdk-lib/aws-lambda';
import * as s3 from 'aws-cdk-lib/aws-s3';
import * as sns from 'aws-cdk-lib/aws-sns';
import * as sqs from 'aws-cdk-lib/aws-sqs';
import { Construct } from 'constructs';
import { allowServices, CACHE_PREFIX, Deployment } from './deployment';
import { ClipSettings, fill, Retention, retentionParameters } from './settings';

export { Artifacts, ClipArtifacts, ClipContainerImage, PublishedArtifacts } from './artifacts';
export { ClipModel } from './model';
export { TemplateParameters } from './parameters';
export { CapacityOption, ClipSettings, ModelBundle, OutputKind, Retention } from './settings';

export interface ClipImagePipelineProps extends ClipSettings {
  /** The VPC in which the GPU instances run. */
  readonly vpc: ec2.IVpc;
  /** The buckets with images, at most three. Their events are sent to EventBridge from now on, unless `parameters.SourceEvents` is `None`. */
  readonly sources: s3.IBucket[];
  /**
   * Only objects whose key begins with this are embedded.
   * @default all
   */
  readonly sourcePrefix?: string;
  /**
   * Where the vectors go, below `clip-image-processor/`. Its lifetimes are its own.
   * @default a bucket of the construct's own, which stays when the stack is deleted
   */
  readonly cacheBucket?: s3.IBucket;
  /**
   * Encrypts queues, topic, vectors, volumes, model cache and logs.
   * @default keys that AWS manages
   */
  readonly kmsKey?: kms.IKey;
  /**
   * The lifetime of vectors in the construct's own bucket, and of messages, which live 14 days at most.
   * @default 14 days
   */
  readonly vectorRetention?: Retention;
}

/** CLIP vectors for the images of some buckets, without Lakechain. */
export class ClipImagePipeline extends Construct {
  /** CloudEvents go here. */
  public readonly queue: sqs.IQueue;
  public readonly deadLetterQueue: sqs.IQueue;
  /** Events that the intake function could not take. */
  public readonly intakeFailureQueue: sqs.IQueue;
  /** Finished documents are announced here, if `outputs` has it. */
  public readonly topic: sns.ITopic;
  /** And here, if `outputs` has `queue`. */
  public readonly outputQueue?: sqs.IQueue;
  public readonly cacheBucket: s3.IBucket;
  /** For S3 notifications, SNS subscriptions and pipes. */
  public readonly intake: lambda.IFunction;
  public readonly scaler: lambda.IFunction;
  /** By their names in the template, such as `DeadLetterAlarm`. */
  public readonly alarms: { readonly [name: string]: cloudwatch.IAlarm };
  /** The resources of `infra/template.yaml`, by their names there. */
  public readonly deployment: Deployment;
  private readonly kmsKey?: kms.IKey;

  constructor(scope: Construct, id: string, props: ClipImagePipelineProps) {
    super(scope, id);
    const { sources, cacheBucket, kmsKey } = props;
    if (!sources.length) throw new Error('sources needs at least one bucket');
    this.kmsKey = kmsKey;
    this.deployment = new Deployment(this, 'Pipeline', {
      ...props,
      values: {
        ...fill('SourceBucket', sources.map(({ bucketName }) => bucketName)),
        SourcePrefix: props.sourcePrefix,
        CacheBucketName: cacheBucket?.bucketName,
        ...retentionParameters(props.vectorRetention),
      },
      substitutes: {},
      leftOut: [],
    });
    const { taskRole, intake, scaler } = this.deployment;
    this.intake = intake;
    this.scaler = scaler;
    for (const source of sources) {
      if (props.parameters?.SourceEvents !== 'None') source.enableEventBridgeNotification();
      for (const role of [taskRole, intake.role!]) source.encryptionKey?.grantDecrypt(role);
    }
    this.queue = this.queueOf('InputQueue');
    this.deadLetterQueue = this.queueOf('DeadLetterQueue');
    this.intakeFailureQueue = this.queueOf('IntakeFailureQueue');
    if (props.outputs?.includes('queue')) this.outputQueue = this.queueOf('OutputQueue');
    this.topic = sns.Topic.fromTopicArn(this, 'OutputTopic', this.deployment.resource('OutputTopic').ref);
    this.cacheBucket = cacheBucket
      ?? s3.Bucket.fromBucketAttributes(this, 'CacheBucket', { bucketName: this.deployment.resource('CacheBucket').ref, encryptionKey: kmsKey });
    if (cacheBucket?.encryptionKey && cacheBucket.encryptionKey !== kmsKey) {
      for (const role of [taskRole, intake.role!]) cacheBucket.encryptionKey.grantEncryptDecrypt(role);
    }
    this.alarms = this.deployment.alarms();
    if (kmsKey) {
      allowLogs(kmsKey);
      allowServices(kmsKey, 'events', 'sns');
    }
  }

  /** Lets somebody read the vectors. */
  public grantReadVectors(grantee: iam.IGrantable): iam.Grant {
    return this.cacheBucket.grantRead(grantee, `${CACHE_PREFIX}/*`);
  }

  private queueOf(name: string): sqs.IQueue {
    return sqs.Queue.fromQueueAttributes(this, name, {
      queueArn: this.deployment.resource(name).getAtt('Arn').toString(), keyArn: this.kmsKey?.keyArn,
    });
  }
}

/** CloudWatch Logs uses the key for this account's log groups. */
function allowLogs(key: kms.IKey): void {
  key.addToResourcePolicy(new iam.PolicyStatement({
    principals: [new iam.ServicePrincipal('logs.amazonaws.com')],
    actions: ['kms:Encrypt', 'kms:Decrypt', 'kms:ReEncrypt*', 'kms:GenerateDataKey*', 'kms:DescribeKey'],
    resources: ['*'],
    conditions: {
      ArnLike: {
        'kms:EncryptionContext:aws:logs:arn': `arn:${Aws.PARTITION}:logs:${Aws.REGION}:${Aws.ACCOUNT_ID}:log-group:*`,
      },
    },
  }));
}
