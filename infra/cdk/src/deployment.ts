import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Aws, CfnResource, Stack } from 'aws-cdk-lib';
import * as cloudwatch from 'aws-cdk-lib/aws-cloudwatch';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as ecs from 'aws-cdk-lib/aws-ecs';
import * as iam from 'aws-cdk-lib/aws-iam';
import * as kms from 'aws-cdk-lib/aws-kms';
import * as lambda from 'aws-cdk-lib/aws-lambda';
import { CfnInclude } from 'aws-cdk-lib/cloudformation-include';
import { Construct } from 'constructs';
import { accountBucket, Artifacts, ClipContainerImage } from './artifacts';
import { TemplateParameters } from './parameters';
import { ClipSettings, fill, numbered, TEMPLATE, toParameters } from './settings';
import { specialise, Substitutes } from './template';

/** The folder of the vectors in the cache, as the template tells the programs. */
export const CACHE_PREFIX = (() => {
  const { Environment } = TEMPLATE.Resources.IntakeFunction!.Properties as { Environment: { Variables: { CACHE_PREFIX: string } } };
  return Environment.Variables.CACHE_PREFIX;
})();

/** Characters of a construct's path in a name: with a stack's 128 there is room for more in the 255 of the shortest. */
const LONGEST_NAME = 60;

/** What a construct around the template decides. */
export interface DeploymentProps extends ClipSettings {
  readonly vpc: ec2.IVpc;
  readonly kmsKey?: kms.IKey;
  readonly values: TemplateParameters;
  /** Resources of the template that exist already. */
  readonly substitutes: Substitutes;
  /** Resources of the template that are not made. */
  readonly leftOut: string[];
}

/** The resources of `infra/template.yaml` in a CDK stack. */
export class Deployment extends Construct {
  public readonly intake: lambda.IFunction;
  public readonly scaler: lambda.IFunction;
  /** The role of the GPU tasks. */
  public readonly taskRole: iam.IRole;
  /** The names of the template's resources that are made here. */
  public readonly resourceNames: readonly string[];
  private readonly included: CfnInclude;

  constructor(scope: Construct, id: string, props: DeploymentProps) {
    super(scope, id);
    const artifacts = props.artifacts ?? Artifacts.published();
    const image = artifacts.image(this);
    const { subnetIds } = props.vpc.selectSubnets(
      { subnetType: ec2.SubnetType.PRIVATE_WITH_EGRESS, ...props.vpcSubnets, onePerAz: true });
    if (!subnetIds.length) throw new Error('the VPC has no private subnet with egress: say which to use in vpcSubnets');

    const { template, parameters } = specialise(TEMPLATE, {
      VpcId: props.vpc.vpcId,
      ...fill('PrivateSubnet', subnetIds.slice(0, numbered('PrivateSubnet').length)),
      KmsKeyArn: props.kmsKey?.keyArn,
      ...given(toParameters(props)),
      ModelBucket: (props.modelBundle?.bucket ?? accountBucket(this)).bucketName,
      ...('uri' in image ? {} : given({ ImageRepository: image.repository, ImageReference: image.reference })),
      ...given(props.values),
      ...given(props.parameters ?? {}),
    }, props.substitutes, props.leftOut, `\${AWS::StackName}-${nameWithin(Stack.of(this), scope)}`);
    this.included = include(this, template, parameters);
    this.resourceNames = Object.keys(template.Resources);

    const role = (name: string): iam.IRole =>
      iam.Role.fromRoleName(this, name, this.resource<iam.CfnRole>(name).ref);
    this.taskRole = role('TaskRole');
    this.intake = this.function('Intake', role('IntakeRole'));
    this.scaler = this.function('Scaler', role('ScalerRole'));
    this.provide(artifacts.functionCode.bind(artifacts), image);
    props.modelBundle?.bucket.encryptionKey?.grantDecrypt(this.taskRole);
    if (props.kmsKey) {
      allowVolumes(props.kmsKey);
      if (this.resourceNames.includes('AlarmTopic')) allowServices(props.kmsKey, 'cloudwatch');
    }
  }

  /** A resource of the template by its name there. */
  public resource<T extends CfnResource = CfnResource>(name: string): T {
    return this.included.getResource(name) as T;
  }

  /** All alarms by their names in the template. */
  public alarms(): { [name: string]: cloudwatch.IAlarm } {
    return Object.fromEntries(this.resourceNames
      .filter((name) => TEMPLATE.Resources[name]!.Type === 'AWS::CloudWatch::Alarm')
      .map((name) => [name, cloudwatch.Alarm.fromAlarmArn(this, name, this.resource<cloudwatch.CfnAlarm>(name).attrArn)]));
  }

  private function(name: string, role: iam.IRole): lambda.IFunction {
    const { attrArn: functionArn } = this.resource<lambda.CfnFunction>(`${name}Function`);
    return lambda.Function.fromFunctionAttributes(this, name, { functionArn, role, sameEnvironment: true });
  }

  /** Says where the programs lie. */
  private provide(codeOf: (scope: Construct, name: string) => lambda.Code, image: ClipContainerImage): void {
    for (const id of this.resourceNames) {
      const { Type, Properties } = TEMPLATE.Resources[id]!;
      const { Code, Content } = Properties as { Code?: { S3Key?: string }; Content?: { S3Key?: string } };
      const file = Type!.toString().startsWith('AWS::Lambda::') && (Code ?? Content)?.S3Key;
      if (!file) continue;
      const cfn = this.resource<lambda.CfnFunction | lambda.CfnLayerVersion>(id);
      const code = codeOf(this, file.replace('.zip', ''));
      const { s3Location } = code.bind(cfn);
      if (!s3Location) throw new Error(`${id} needs code in S3: a zip or a folder`);
      const place = { s3Bucket: s3Location.bucketName, s3Key: s3Location.objectKey, s3ObjectVersion: s3Location.objectVersion };
      if (cfn instanceof lambda.CfnLayerVersion) cfn.content = place;
      else cfn.code = place;
      code.bindToResource(cfn, Content && { resourceProperty: 'Content' });
    }
    if ('uri' in image) {
      this.resource<ecs.CfnTaskDefinition>('TaskDefinition').addPropertyOverride('ContainerDefinitions.0.Image', image.uri);
    }
  }
}

/** Tells this pipeline from another one in the stack, in names that the template gives. */
function nameWithin(stack: Stack, scope: Construct): string {
  const path = scope.node.path.slice(stack.node.path.length).replaceAll(/\W+/g, '-').replace(/^-/, '');
  return path.length <= LONGEST_NAME ? path : scope.node.addr;
}

/** CfnInclude wants a file; it has read it when it returns. */
function include(scope: Construct, template: object, parameters: { [name: string]: string | number }): CfnInclude {
  const folder = mkdtempSync(join(tmpdir(), 'clip-image-processor-'));
  try {
    const templateFile = join(folder, 'template.json');
    writeFileSync(templateFile, JSON.stringify(template));
    return new CfnInclude(scope, 'Template', { templateFile, parameters, preserveLogicalIds: false });
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The properties that have a value, so that the others do not hide what they would replace. */
function given<T extends object>(values: T): Partial<T> {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as Partial<T>;
}

/** Lets services read and write what is encrypted with the key, in their own name. */
export function allowServices(key: kms.IKey, ...services: string[]): void {
  key.addToResourcePolicy(new iam.PolicyStatement({
    principals: services.map((service) => new iam.ServicePrincipal(`${service}.amazonaws.com`)),
    actions: ['kms:Decrypt', 'kms:GenerateDataKey'],
    resources: ['*'],
  }));
}

/** Auto Scaling launches instances with encrypted volumes in its own name; its role may not exist yet. */
function allowVolumes(key: kms.IKey): void {
  const anybody = { principals: [new iam.AnyPrincipal()], resources: ['*'] };
  const isAutoScaling = {
    StringEquals: { 'kms:CallerAccount': Aws.ACCOUNT_ID },
    ArnLike: {
      'aws:PrincipalArn':
        `arn:${Aws.PARTITION}:iam::${Aws.ACCOUNT_ID}:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling*`,
    },
  };
  key.addToResourcePolicy(new iam.PolicyStatement({
    ...anybody,
    actions: ['kms:Encrypt', 'kms:Decrypt', 'kms:ReEncrypt*', 'kms:GenerateDataKey*', 'kms:DescribeKey'],
    conditions: isAutoScaling,
  }));
  key.addToResourcePolicy(new iam.PolicyStatement({
    ...anybody,
    actions: ['kms:CreateGrant'],
    conditions: { ...isAutoScaling, Bool: { 'kms:GrantIsForAWSResource': true } },
  }));
}
