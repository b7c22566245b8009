import { Duration } from 'aws-cdk-lib';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as s3 from 'aws-cdk-lib/aws-s3';
import * as sns from 'aws-cdk-lib/aws-sns';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { ClipArtifacts } from './artifacts';
import { ClipModel } from './model';
import { TemplateParameters } from './parameters';
import { Template } from './template';

export const TEMPLATE: Template = JSON.parse(readFileSync(join(__dirname, 'template.json'), 'utf8'));

/** A GPU instance type and how it is bought. */
export interface CapacityOption {
  readonly instanceType: ec2.InstanceType;
  /**
   * Buy it as Spot.
   * @default false
   */
  readonly spot?: boolean;
}

/** Where finished documents are announced. */
export type OutputKind = 'topic' | 'event-bus' | 'queue';

export interface ModelBundle {
  readonly bucket: s3.IBucket;
  /**
   * The bundle's folder.
   * @default clip-models/ViT-B-32, and so on
   */
  readonly prefix?: string;
}

/** How long vectors live. */
export type Retention = Duration | 'forever';

/** What both constructs take. A default that is not named here is the template's (see {@link TemplateParameters}). */
export interface ClipSettings {
  /**
   * The CLIP model.
   * @default ClipModel.VIT_B_32
   */
  readonly model?: ClipModel;
  /**
   * Where the model's bundle, made by `clip-model`, lies.
   * @default the bucket clip-image-processor-ACCOUNT-REGION
   */
  readonly modelBundle?: ModelBundle;
  /**
   * Never more GPU instances than this.
   * @default 5
   */
  readonly maxInstances?: number;
  /**
   * This many instances stay even without work.
   * @default 0
   */
  readonly minInstances?: number;
  /**
   * GPU instance types in order of preference, at most three: the next is tried when there is no capacity of one.
   * @default g4dn.xlarge, g4dn.2xlarge, both On-Demand
   */
  readonly capacity?: CapacityOption[];
  /**
   * Put the five best labels into the event's keywords.
   * @default true
   */
  readonly labelExtraction?: boolean;
  /**
   * `exact`: the reference's pixels. `fast`: JPEGs are decoded at a reduced size where that hardly moves the vector.
   * @default exact
   */
  readonly decode?: 'exact' | 'fast';
  /**
   * An instance goes back once it has been without work for this long.
   * @default 30 seconds
   */
  readonly idleGrace?: Duration;
  /**
   * Enough tasks run to work off the backlog within this time.
   * @default 45 seconds
   */
  readonly targetDrain?: Duration;
  /**
   * Where finished documents are announced.
   * @default the topic
   */
  readonly outputs?: OutputKind[];
  /** Alarms are sent to this topic. */
  readonly alarmTopic?: sns.ITopic;
  /** Alarms are sent to this address too, which has to confirm it once. */
  readonly alarmEmail?: string;
  /**
   * The functions and the container image.
   * @default Artifacts.published()
   */
  readonly artifacts?: ClipArtifacts;
  /**
   * Subnets of the GPU instances, with a way to AWS's APIs; the first three zones are used.
   * @default the private subnets with egress
   */
  readonly vpcSubnets?: ec2.SubnetSelection;
  /** Any other parameter of the template, by its name there. It wins over what the construct would say. */
  readonly parameters?: TemplateParameters;
}

/** Names of a numbered parameter, such as `SourceBucket1` to `SourceBucket3`. */
export function numbered(stem: string): string[] {
  return Object.keys(TEMPLATE.Parameters).filter((name) => new RegExp(`^${stem}\\d+$`).test(name)).sort();
}

/** Fills a numbered parameter in order, and empties the rest. */
export function fill(stem: string, values: string[]): { [name: string]: string } {
  const names = numbered(stem);
  if (values.length > names.length) {
    throw new Error(`at most ${names.length} values are possible for ${stem}, not ${values.length}`);
  }
  return Object.fromEntries(names.map((name, index) => [name, values[index] ?? '']));
}

/** The template's parameters that settings speak of. */
export function toParameters(settings: ClipSettings): TemplateParameters {
  const { capacity, outputs, model = ClipModel.VIT_B_32 } = settings;
  const idle = settings.idleGrace?.toSeconds();
  const order: OutputKind[] = ['topic', 'event-bus', 'queue'];
  return {
    ModelName: model,
    ModelPrefix: settings.modelBundle?.prefix ?? `clip-models/${model.replace('/', '-')}`,
    MaxInstances: settings.maxInstances,
    MinInstances: settings.minInstances,
    ...(capacity && {
      ...fill('InstanceType', capacity.map(({ instanceType }) => instanceType.toString())),
      // An option that is not used is still bought somehow, says the template.
      ...fill('Purchase', numbered('Purchase').map((_, index) => (capacity[index]?.spot ? 'spot' : 'on-demand'))),
    }),
    ExtractLabels: settings.labelExtraction === undefined ? undefined : settings.labelExtraction ? 'true' : 'false',
    Decode: settings.decode,
    IdleGraceSeconds: idle,
    // A task must not end before its instance may go back.
    IdleExitSeconds: idle === undefined ? undefined : Math.max(idle, Number(TEMPLATE.Parameters.IdleExitSeconds!.Default)),
    TargetDrainSeconds: settings.targetDrain?.toSeconds(),
    OutputKind: outputs && (order.filter((kind) => outputs.includes(kind)).join('+') as TemplateParameters['OutputKind']),
    AlarmTopicArn: settings.alarmTopic?.topicArn,
    AlarmEmail: settings.alarmEmail,
  };
}

/** Days, of which `forever` has infinitely many. */
export function days(retention: Retention): number {
  return retention === 'forever' ? Infinity : retention.toDays();
}

/** Messages live as long as what they point to, within what SQS allows. */
export function retentionParameters(vectors?: Retention): TemplateParameters {
  if (!vectors) return {};
  const time = days(vectors);
  if (time < TEMPLATE.Parameters.RetentionDays!.MaxValue!) return { RetentionDays: time };
  return { VectorRetentionDays: time === Infinity ? '0' : String(time) };
}
