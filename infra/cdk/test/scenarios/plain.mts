// The plain construct where Lakechain is not installed, from an ES module; prints its templates.
import * as cdk from 'aws-cdk-lib';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as iam from 'aws-cdk-lib/aws-iam';
import * as kms from 'aws-cdk-lib/aws-kms';
import * as s3 from 'aws-cdk-lib/aws-s3';
import * as subscriptions from 'aws-cdk-lib/aws-sns-subscriptions';
import * as sqs from 'aws-cdk-lib/aws-sqs';
import { Artifacts, ClipImagePipeline, ClipModel } from 'clip-image-processor/pipeline';

const app = new cdk.App({ analyticsReporting: false });

{
  const stack = new cdk.Stack(app, 'Least');
  const vpc = new ec2.Vpc(stack, 'Vpc', {});
  const bucket = new s3.Bucket(stack, 'Images');
  const clip = new ClipImagePipeline(stack, 'Clip', { vpc, sources: [bucket] });
  const reader = new iam.Role(stack, 'Reader', { assumedBy: new iam.AccountRootPrincipal() });
  clip.grantReadVectors(reader);
  clip.topic.addSubscription(new subscriptions.SqsSubscription(new sqs.Queue(stack, 'Results')));
  clip.queue.grantSendMessages(reader);
  clip.intake.grantInvoke(reader);
  new cdk.CfnOutput(stack, 'Alarms', { value: Object.keys(clip.alarms).join(' ') });
}

{
  const stack = new cdk.Stack(app, 'Most');
  const key = new kms.Key(stack, 'Key');
  const imageKey = new kms.Key(stack, 'ImageKey');
  const cacheBucket = new s3.Bucket(stack, 'Vectors', { encryptionKey: key });
  const models = new s3.Bucket(stack, 'Models');
  const clip = new ClipImagePipeline(stack, 'Clip', {
    vpc: new ec2.Vpc(stack, 'Vpc', { availabilityZones: ['a', 'b', 'c', 'd'] }),
    sources: [new s3.Bucket(stack, 'Images', { encryptionKey: imageKey }), new s3.Bucket(stack, 'More')],
    sourcePrefix: 'photos/',
    cacheBucket,
    kmsKey: key,
    vectorRetention: cdk.Duration.days(7),
    model: ClipModel.VIT_L_14,
    modelBundle: { bucket: models, prefix: 'clip/L-14' },
    maxInstances: 2,
    outputs: ['queue'],
    alarmEmail: 'somebody@example.com',
    artifacts: Artifacts.published({ bucket: models, prefix: 'programs', image: { uri: 'registry.example/clip:1' } }),
  });
  clip.grantReadVectors(new iam.Role(stack, 'Reader', { assumedBy: new iam.AccountRootPrincipal() }));
}

const templates = Object.fromEntries(app.synth().stacks.map(({ stackName, template }) => [stackName, template]));
process.stdout.write(JSON.stringify({ templates }));
