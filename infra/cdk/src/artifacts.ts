import { existsSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { Fn } from 'aws-cdk-lib';
import * as assets from 'aws-cdk-lib/aws-ecr-assets';
import * as lambda from 'aws-cdk-lib/aws-lambda';
import * as s3 from 'aws-cdk-lib/aws-s3';
import { Construct } from 'constructs';

/** This package's version, which is also that of the programs that it deploys by default. */
export const VERSION: string = JSON.parse(readFileSync(join(__dirname, '../package.json'), 'utf8')).version;

/** A container image: in ECR of the stack's account and region, or anywhere that instances can pull from. */
export type ClipContainerImage =
  | { readonly repository?: string; readonly reference: string }
  | { readonly uri: string };

/** Where the programs come from: a package for each Lambda function, and the container image of the GPU tasks. */
export interface ClipArtifacts {
  /** @param name of the function in this project's `functions/`, such as `intake`, or of the layer in the template. */
  functionCode(scope: Construct, name: string): lambda.Code;
  image(scope: Construct): ClipContainerImage;
}

export interface PublishedArtifacts {
  /**
   * The bucket with the functions' packages, in the stack's region.
   * @default the account's own, {@link accountBucket}
   */
  readonly bucket?: s3.IBucket;
  /**
   * The folder of `intake.zip` and the others.
   * @default functions/VERSION of this package
   */
  readonly prefix?: string;
  /**
   * The container image.
   * @default clip-image-processor:VERSION of this package in the account's ECR
   */
  readonly image?: ClipContainerImage;
}

/** `clip-image-processor-ACCOUNT-REGION`: where functions and models lie unless said otherwise. */
export function accountBucket(scope: Construct): s3.IBucket {
  const id = 'AccountBucket';
  return (scope.node.tryFindChild(id) as s3.IBucket | undefined)
    ?? s3.Bucket.fromBucketName(scope, id, Fn.sub('clip-image-processor-${AWS::AccountId}-${AWS::Region}'));
}

export class Artifacts {
  /** Released or built beforehand, and uploaded. */
  static published({ bucket, prefix, image }: PublishedArtifacts = {}): ClipArtifacts {
    return {
      functionCode: (scope, name) =>
        lambda.Code.fromBucket(bucket ?? accountBucket(scope), `${prefix ?? `functions/${VERSION}`}/${name}.zip`),
      image: () => image ?? { reference: `:${VERSION}` },
    };
  }

  /**
   * From a checkout of this project: functions as `cargo lambda build --release` left them in
   * `target/lambda`, the layer as `make -C infra/image` left it there, and the image built by Docker when the app is deployed.
   */
  static checkout(root: string): ClipArtifacts {
    return {
      functionCode(_, name) {
        const built = resolve(root, 'target/lambda', name);
        if (name.endsWith('Layer')) {
          if (!existsSync(built)) {
            const make = `make -C infra/image build-${name} ARTIFACTS_DIR=${built}`;
            throw new Error(`${built} is not there: run \`${make}\` in ${root}`);
          }
        } else if (!existsSync(join(built, 'bootstrap'))) {
          throw new Error(`${built} holds no bootstrap: run \`cargo lambda build --release --package ${name}\` in ${root}`);
        }
        return lambda.Code.fromAsset(built);
      },
      image(scope) {
        const asset = new assets.DockerImageAsset(scope, 'Image', {
          directory: root,
          file: 'gpu-task/Dockerfile',
          target: 'cuda',
          platform: assets.Platform.LINUX_AMD64,
        });
        return { repository: asset.repository.repositoryName, reference: `:${asset.imageTag}` };
      },
    };
  }
}
