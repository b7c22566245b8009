// The contract of @project-lakechain/core 0.10 as far as a middleware sees it,
// written from its behaviour: what it creates, connects and grants, and its bug
// of keying every condition alike. Only tests use it.
import { EventEmitter } from 'node:events';
import { Aws, Duration, Names, Stack, Tags, RemovalPolicy } from 'aws-cdk-lib';
import * as cloudwatch from 'aws-cdk-lib/aws-cloudwatch';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as iam from 'aws-cdk-lib/aws-iam';
import * as kms from 'aws-cdk-lib/aws-kms';
import * as logs from 'aws-cdk-lib/aws-logs';
import * as s3 from 'aws-cdk-lib/aws-s3';
import * as sns from 'aws-cdk-lib/aws-sns';
import * as sqs from 'aws-cdk-lib/aws-sqs';
import * as ssm from 'aws-cdk-lib/aws-ssm';
import { Construct } from 'constructs';

export enum ComputeType { CPU = 'CPU', GPU = 'GPU', ACCELERATOR = 'ACCELERATOR' }

type Filter = Record<string, unknown>;

function place(path: string, value: unknown): Filter {
  return path.split('.').reduceRight<unknown>((inner, key) => ({ [key]: inner }), value) as Filter;
}

function find(filter: Filter, path: string): unknown {
  return path.split('.').reduce<unknown>((at, key) => (at as Filter | undefined)?.[key], filter);
}

function merge(into: Filter, from: Filter): void {
  for (const [key, value] of Object.entries(from)) {
    if (value instanceof Object && !Array.isArray(value) && into[key] instanceof Object) {
      merge(into[key] as Filter, value as Filter);
    } else {
      into[key] = value;
    }
  }
}

export class ConditionalStatement {
  constructor(private readonly aggregate: object, private readonly subjectValue: string) {}
  static empty(): ConditionalStatement { return new ConditionalStatement({}, ''); }
  and(other: ConditionalStatement): this {
    if (find(this.aggregate as Filter, other.subject())) {
      throw new Error(`there is a condition on ${other.subject()} already`);
    }
    merge(this.aggregate as Filter, other.value() as Filter);
    return this;
  }
  value(): object { return this.aggregate; }
  subject(): string { return this.subjectValue; }
}

export class Condition {
  constructor(private readonly path: string) {}
  private is(value: unknown): ConditionalStatement {
    return new ConditionalStatement(place(this.path, value), this.path);
  }
  equals(value: string | number): ConditionalStatement {
    return this.is(typeof value === 'string' ? [value] : [{ numeric: ['=', value] }]);
  }
  includes(...values: string[]): ConditionalStatement { return this.is(values); }
  startsWith(prefix: string): ConditionalStatement { return this.is([{ prefix }]); }
  gt(value: number): ConditionalStatement { return this.is([{ numeric: ['>', value] }]); }
  lt(value: number): ConditionalStatement { return this.is([{ numeric: ['<', value] }]); }
  exists(): ConditionalStatement { return this.is([{ exists: true }]); }
}

export const when = (path: string): Condition => new Condition(path);

export class CacheStorage extends Construct {
  private readonly bucket: s3.Bucket;
  constructor(scope: Construct, id: string, props: { removalPolicy?: RemovalPolicy; encryptionKey?: kms.IKey } = {}) {
    super(scope, id);
    this.bucket = new s3.Bucket(this, 'Storage', {
      encryptionKey: props.encryptionKey,
      enforceSSL: true,
      blockPublicAccess: s3.BlockPublicAccess.BLOCK_ALL,
      lifecycleRules: [{ expiration: Duration.days(1), abortIncompleteMultipartUploadAfter: Duration.days(1) }],
    });
  }
  getBucket(): s3.IBucket { return this.bucket; }
  id(): string { return this.bucket.bucketName; }
  kmsKey(): kms.IKey | undefined { return this.bucket.encryptionKey; }
}

export interface ServiceDescription {
  readonly name: string;
  readonly description: string;
  readonly version: string;
  attrs: { [key: string]: string };
}

export class Service extends Construct {
  constructor(scope: Construct, id: string, protected readonly description: ServiceDescription) {
    super(scope, id);
    this.addProperty('description', description.description);
    Tags.of(this).add('Context', 'project-lakechain');
    Tags.of(this).add('Service', description.name);
    Tags.of(this).add('Version', description.version);
  }
  serviceDescription(): ServiceDescription { return this.description; }
  addProperty(key: string, value: string): ssm.StringParameter {
    const { name, version } = this.description;
    return new ssm.StringParameter(this, key, {
      parameterName: `/services/${this.node.addr}/${name}/${version}/${key}`,
      stringValue: value,
    });
  }
}

export interface MiddlewareProps {
  sources: Set<Middleware>;
  destinations: Set<Middleware>;
  conditionals: Map<string, ConditionalStatement>;
  computeType?: ComputeType;
  maxRetry?: number;
  queueVisibilityTimeout?: Duration;
  batchingWindow?: Duration;
  batchSize?: number;
  maxConcurrency?: number;
  cloudWatchInsights: boolean;
  cacheStorage: CacheStorage;
  logRetention: logs.RetentionDays;
  maxMemorySize?: number;
  kmsKey?: kms.IKey;
  keyReusePeriod: Duration;
  vpc?: ec2.IVpc;
}

export abstract class MiddlewareBuilder {
  protected scope!: Construct;
  protected identifier!: string;
  protected props = {
    sources: new Set(), destinations: new Set(), conditionals: new Map(),
  } as unknown as MiddlewareProps;

  #put<K extends keyof MiddlewareProps>(key: K, value: MiddlewareProps[K]): this {
    this.props[key] = value;
    return this;
  }
  withScope(scope: Construct): this { this.scope = scope; return this; }
  withIdentifier(identifier: string): this { this.identifier = identifier; return this; }
  withSource(source: Middleware, condition?: ConditionalStatement): this {
    // `serviceDescription` is a function here, so its name is the same for every source.
    if (condition) this.props.conditionals.set(source.serviceDescription.name, condition);
    this.props.sources.add(source);
    return this;
  }
  withSources(sources: Middleware[], condition?: ConditionalStatement): this {
    sources.forEach((source) => this.withSource(source, condition));
    return this;
  }
  withConsumer(consumer: Middleware): this { this.props.destinations.add(consumer); return this; }
  withConsumers(consumers: Middleware[]): this { consumers.forEach((c) => this.withConsumer(c)); return this; }
  withComputeType(value: ComputeType): this { return this.#put('computeType', value); }
  withMaxRetry(value: number): this { return this.#put('maxRetry', value); }
  withQueueVisibilityTimeout(value: Duration): this { return this.#put('queueVisibilityTimeout', value); }
  withBatchingWindow(value: Duration): this { return this.#put('batchingWindow', value); }
  withBatchSize(value: number): this { return this.#put('batchSize', value); }
  withMaxConcurrency(value: number): this { return this.#put('maxConcurrency', value); }
  withCloudWatchInsights(value: boolean): this { return this.#put('cloudWatchInsights', value); }
  withCacheStorage(value: CacheStorage): this { return this.#put('cacheStorage', value); }
  withLogRetention(value: logs.RetentionDays): this { return this.#put('logRetention', value); }
  withMaxMemorySize(value: number): this { return this.#put('maxMemorySize', value); }
  withKmsKey(value: kms.IKey): this { return this.#put('kmsKey', value); }
  withKeyReusePeriod(value: Duration): this { return this.#put('keyReusePeriod', value); }
  withVpc(value: ec2.IVpc): this { return this.#put('vpc', value); }
  abstract build(): Middleware;
}

export abstract class Middleware extends Service {
  protected sources = new Set<Middleware>();
  protected destinations = new Set<Middleware>();
  protected conditionals: Map<string, ConditionalStatement>;
  protected deadLetterQueue: sqs.IQueue;
  protected eventQueue: sqs.IQueue;
  protected eventBus: sns.ITopic;
  protected logGroup: logs.ILogGroup;
  public grantPrincipal!: iam.IPrincipal;
  private readonly emitter = new EventEmitter();
  private readonly connections = new Set<string>();
  private readonly given: MiddlewareProps;

  constructor(scope: Construct, id: string, description: ServiceDescription, props: MiddlewareProps) {
    super(scope, id, description);
    this.given = props;
    this.conditionals = props.conditionals;
    if (!(props.cacheStorage instanceof CacheStorage)) {
      throw new Error('You must provide a cache storage. See withCacheStorage().');
    }
    if (props.computeType && !this.supportedComputeTypes().includes(props.computeType)) {
      throw new Error(`${this.name()} does not run on ${props.computeType}`);
    }
    const queue = {
      retentionPeriod: Duration.days(14),
      encryptionMasterKey: props.kmsKey,
      encryption: props.kmsKey ? sqs.QueueEncryption.KMS : sqs.QueueEncryption.SQS_MANAGED,
      dataKeyReuse: props.kmsKey ? props.keyReusePeriod ?? Duration.minutes(5) : undefined,
      enforceSSL: true,
    };
    this.deadLetterQueue = new sqs.Queue(this, 'DeadLetterQueue', queue);
    this.eventQueue = new sqs.Queue(this, 'Queue', {
      ...queue,
      visibilityTimeout: props.queueVisibilityTimeout,
      deadLetterQueue: { queue: this.deadLetterQueue, maxReceiveCount: props.maxRetry ?? 5 },
    });
    this.eventBus = new sns.Topic(this, 'Topic', { masterKey: props.kmsKey });
    const logGroupName = `/lakechain/${Stack.of(this).stackName}/middlewares/${this.name()}/${this.node.addr}`;
    this.logGroup = new logs.LogGroup(this, 'LogGroup', {
      logGroupName,
      encryptionKey: props.kmsKey,
      retention: props.logRetention ?? logs.RetentionDays.ONE_WEEK,
      removalPolicy: RemovalPolicy.DESTROY,
    });
    props.kmsKey?.addToResourcePolicy(new iam.PolicyStatement({
      principals: [new iam.ServicePrincipal('logs.amazonaws.com')],
      actions: ['kms:Encrypt*', 'kms:ReEncrypt*', 'kms:Decrypt*', 'kms:GenerateDataKey*', 'kms:Describe*'],
      resources: ['*'],
      conditions: {
        ArnLike: {
          'kms:EncryptionContext:aws:logs:arn':
            `arn:${Aws.PARTITION}:logs:${Aws.REGION}:${Aws.ACCOUNT_ID}:log-group:${logGroupName}`,
        },
      },
    }));
    this.addProperty('input-queue/url', this.eventQueue.queueUrl);
    this.addProperty('event-bus/arn', this.eventBus.topicArn);
    this.addProperty('log-group/name', this.logGroup.logGroupName);
  }

  name(): string { return this.description.name; }
  getSources(): Set<Middleware> { return this.sources; }
  getConsumers(): Set<Middleware> { return this.destinations; }
  getQueue(): sqs.IQueue { return this.eventQueue; }
  getDeadLetterQueue(): sqs.IQueue { return this.deadLetterQueue; }
  getEventBus(): sns.ITopic { return this.eventBus; }
  getInput(): sqs.IQueue { return this.getQueue(); }
  getLogGroup(): logs.ILogGroup { return this.logGroup; }

  pipe(consumer: Middleware, conditional: ConditionalStatement = consumer.conditional()): Middleware {
    const accepted = consumer.supportedInputTypes();
    const any = (types: string[]): boolean => types.includes('*/*');
    if (!any(accepted) && !any(this.supportedOutputTypes())
      && !accepted.some((type) => this.supportedOutputTypes().includes(type))) {
      throw new Error(`'${this.name()}' is not compatible with '${consumer.name()}'`);
    }
    if (!find(conditional.value() as Filter, 'data.document.type') && !any(accepted)) {
      conditional.and(when('data.document.type').includes(...accepted));
    }
    const queue = consumer.getInput();
    // Anything but a queue of this program is left alone, as upstream does.
    if (queue instanceof sqs.Queue) this.connect(queue, conditional);
    if (consumer.grantPrincipal) this.grantReadProcessedDocuments(consumer);
    this.destinations.add(consumer);
    consumer.sources.add(this);
    setImmediate(() => this.emit('consumer-added', consumer));
    setImmediate(() => consumer.emit('source-added', this));
    return consumer;
  }

  private connect(queue: sqs.Queue, conditional: ConditionalStatement): void {
    const id = `${Names.nodeUniqueId(this.eventBus.node)}-${Names.nodeUniqueId(queue.node)}`;
    if (this.connections.has(id)) return;
    this.connections.add(id);
    const sender = new iam.ServicePrincipal('sns.amazonaws.com');
    queue.addToResourcePolicy(new iam.PolicyStatement({
      principals: [sender],
      actions: ['sqs:SendMessage'],
      resources: [queue.queueArn],
      conditions: { ArnEquals: { 'aws:SourceArn': this.eventBus.topicArn } },
    }));
    queue.encryptionMasterKey?.addToResourcePolicy(new iam.PolicyStatement({
      principals: [sender], actions: ['kms:Decrypt', 'kms:GenerateDataKey*'], resources: ['*'],
    }));
    new sns.CfnSubscription(this, id, {
      protocol: 'sqs',
      topicArn: this.eventBus.topicArn,
      endpoint: queue.queueArn,
      rawMessageDelivery: true,
      filterPolicyScope: 'MessageBody',
      filterPolicy: conditional.value(),
    });
  }

  conditional(): ConditionalStatement {
    const types = this.supportedInputTypes();
    return types.includes('*/*') ? ConditionalStatement.empty() : when('data.document.type').includes(...types);
  }

  protected bind(): void {
    for (const source of this.given.sources) {
      source.pipe(this, this.conditionals.get(source.serviceDescription.name));
    }
    for (const consumer of this.given.destinations) {
      this.pipe(consumer, this.conditionals.get(consumer.serviceDescription.name));
    }
    if (this.grantPrincipal) {
      const bucket = this.given.cacheStorage.getBucket();
      bucket.grantRead(this.grantPrincipal);
      bucket.grantWrite(this.grantPrincipal, `${this.name()}/*`);
      this.given.kmsKey?.grantEncryptDecrypt(this.grantPrincipal);
    }
  }

  on(event: string | symbol, listener: (...args: any[]) => void): this { this.emitter.on(event, listener); return this; }
  once(event: string | symbol, listener: (...args: any[]) => void): this { this.emitter.once(event, listener); return this; }
  off(event: string | symbol, listener: (...args: any[]) => void): this { this.emitter.off(event, listener); return this; }
  emit(event: string | symbol, ...args: any[]): boolean { return this.emitter.emit(event, ...args); }

  metricInFlightMessages(props: cloudwatch.MetricOptions = {}): cloudwatch.Metric {
    return this.eventQueue.metricApproximateNumberOfMessagesVisible(props);
  }
  metricDeadLetterQueueMessages(props: cloudwatch.MetricOptions = {}): cloudwatch.Metric {
    return this.deadLetterQueue.metricApproximateNumberOfMessagesVisible(props);
  }
  metricPublishedMessages(props: cloudwatch.MetricOptions = {}): cloudwatch.Metric {
    return this.eventBus.metricNumberOfMessagesPublished(props);
  }
  metricDeliveredMessages(props: cloudwatch.MetricOptions = {}): cloudwatch.Metric {
    return this.eventBus.metricNumberOfNotificationsDelivered(props);
  }
  metricFailedMessages(props: cloudwatch.MetricOptions = {}): cloudwatch.Metric {
    return this.eventBus.metricNumberOfNotificationsFailed(props);
  }

  abstract supportedInputTypes(): string[];
  abstract supportedOutputTypes(): string[];
  abstract supportedComputeTypes(): ComputeType[];
  abstract grantReadProcessedDocuments(grantee: iam.IGrantable): iam.Grant;
}
