// The same chain around upstream's middleware and around ours; prints both templates.
import * as cdk from 'aws-cdk-lib';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import * as lambda from 'aws-cdk-lib/aws-lambda';
import { dirname, join } from 'node:path';
import { CacheStorage } from '@project-lakechain/core';
import { ClipImageProcessor as Ours } from 'clip-image-processor';
import { ClipImageProcessor as Upstreams } from 'upstream';
import { trigger, VectorStore } from './middlewares';

// Upstream's functions are not bundled, which would take esbuild or Docker.
const { Bundling } = require(join(dirname(require.resolve('aws-cdk-lib/package.json')), 'aws-lambda-nodejs/lib/bundling.js'));
Bundling.bundle = () => lambda.Code.fromInline('nothing');

function chain(Processor: typeof Ours | typeof Upstreams): object {
  const app = new cdk.App({ analyticsReporting: false });
  const stack = new cdk.Stack(app, 'Chain');
  const vpc = new ec2.Vpc(stack, 'Vpc', {
    subnetConfiguration: [ec2.SubnetType.PUBLIC, ec2.SubnetType.PRIVATE_WITH_EGRESS, ec2.SubnetType.PRIVATE_ISOLATED]
      .map((subnetType) => ({ name: subnetType, subnetType })),
  });
  const cache = new CacheStorage(stack, 'Cache');
  const source = trigger(stack, cache);
  const clip = new Processor.Builder()
    .withScope(stack).withIdentifier('Clip').withCacheStorage(cache).withVpc(vpc).withSource(source)
    .withQueueVisibilityTimeout(cdk.Duration.minutes(3)).build();
  new VectorStore.Builder().withScope(stack).withIdentifier('Store').withCacheStorage(cache).withSource(clip).build();
  return app.synth().getStackByName('Chain').template;
}

process.stdout.write(JSON.stringify({ upstream: chain(Upstreams), ours: chain(Ours) }));
