// Prints the template of a stack with nothing but the pipeline, for tools that deploy or check it:
//
//     node scripts/example.mjs [pipeline|lakechain] ['{"IdleGraceSeconds": 1, …}']
//
// Resources keep their names in infra/template.yaml, so that a tool finds them as in the SAM template. The
// parameters are the template's; there are none left in what is printed. `lakechain` is the middleware, on the tests'
// stand-in for core.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { App, Stack } from 'aws-cdk-lib';
import { Vpc } from 'aws-cdk-lib/aws-ec2';
import { Bucket } from 'aws-cdk-lib/aws-s3';
import { ClipImagePipeline } from 'clip-image-processor/pipeline';

const [kind = 'pipeline', text = '{}'] = process.argv.slice(2);
const parameters = JSON.parse(text);
const outdir = mkdtempSync(join(tmpdir(), 'clip-example-'));
const app = new App({ analyticsReporting: false, outdir });
const stack = new Stack(app, 'Example');
const vpc = Vpc.fromVpcAttributes(stack, 'Vpc', {
  vpcId: 'vpc-12345678', availabilityZones: ['one', 'two'], privateSubnetIds: ['subnet-11111111', 'subnet-22222222'],
});

let made;
if (kind === 'lakechain') {
  const { CacheStorage } = await import('@project-lakechain/core');
  const { ClipImageProcessor } = await import('clip-image-processor');
  made = new ClipImageProcessor.Builder().withScope(stack).withIdentifier('Clip').withVpc(vpc)
    .withCacheStorage(new CacheStorage(stack, 'Cache')).withParameters(parameters).build();
} else {
  made = new ClipImagePipeline(stack, 'Clip', {
    vpc, parameters, sources: [Bucket.fromBucketName(stack, 'Images', parameters.SourceBucket1 ?? 'images')],
  });
}
for (const name of made.deployment.resourceNames) made.deployment.resource(name).overrideLogicalId(name);
process.stdout.write(JSON.stringify(app.synth().getStackByName('Example').template, null, 1));
rmSync(outdir, { recursive: true });
