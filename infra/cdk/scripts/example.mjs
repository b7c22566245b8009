// Prints the template of a stack with nothing but the pipeline, for tools that deploy or check it.
// `node scripts/example.mjs lakechain` prints one with Lakechain's middleware instead, on the tests' stand-in for core.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { App, Stack } from 'aws-cdk-lib';
import { Vpc } from 'aws-cdk-lib/aws-ec2';
import { Bucket } from 'aws-cdk-lib/aws-s3';
import { ClipImagePipeline } from 'clip-image-processor/pipeline';

const outdir = mkdtempSync(join(tmpdir(), 'clip-example-'));
const app = new App({ analyticsReporting: false, outdir });
const stack = new Stack(app, 'Example');
const vpc = Vpc.fromVpcAttributes(stack, 'Vpc', {
  vpcId: 'vpc-12345678', availabilityZones: ['one', 'two'], privateSubnetIds: ['subnet-11111111', 'subnet-22222222'],
});
const images = Bucket.fromBucketName(stack, 'Images', 'images');

if (process.argv[2] === 'lakechain') {
  const { CacheStorage } = await import('@project-lakechain/core');
  const { ClipImageProcessor } = await import('clip-image-processor');
  new ClipImageProcessor.Builder()
    .withScope(stack).withIdentifier('Clip').withVpc(vpc).withCacheStorage(new CacheStorage(stack, 'Cache')).build();
} else {
  new ClipImagePipeline(stack, 'Clip', { vpc, sources: [images] });
}
process.stdout.write(JSON.stringify(app.synth().getStackByName('Example').template, null, 1));
rmSync(outdir, { recursive: true });
