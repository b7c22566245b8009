// What stands before and after in the tests: a source like Lakechain's S3 trigger, and a
// consumer like its vector stores, on core alone.
import * as iam from 'aws-cdk-lib/aws-iam';
import * as s3 from 'aws-cdk-lib/aws-s3';
import * as notifications from 'aws-cdk-lib/aws-s3-notifications';
import { CacheStorage, ComputeType, Middleware, MiddlewareBuilder, MiddlewareProps, when } from '@project-lakechain/core';
import { Construct } from 'constructs';

function describe(name: string) {
  return { name, description: name, version: '1.0.0', attrs: {} };
}

function role(scope: Construct): iam.IRole {
  return new iam.Role(scope, 'Role', { assumedBy: new iam.ServicePrincipal('lambda.amazonaws.com') });
}

class TriggerBuilder extends MiddlewareBuilder {
  public build(): Trigger { return new Trigger(this.scope, this.identifier, this.props); }
}

export class Trigger extends Middleware {
  static readonly Builder = TriggerBuilder;
  readonly bucket: s3.Bucket;
  constructor(scope: Construct, id: string, props: MiddlewareProps) {
    super(scope, id, describe('s3-event-trigger'), props);
    this.bucket = new s3.Bucket(this, 'Images');
    this.bucket.addObjectCreatedNotification(new notifications.SqsDestination(this.eventQueue));
    this.bucket.addObjectRemovedNotification(new notifications.SqsDestination(this.eventQueue));
    this.grantPrincipal = role(this).grantPrincipal;
    super.bind();
  }
  grantReadProcessedDocuments(grantee: iam.IGrantable): iam.Grant { return this.bucket.grantRead(grantee); }
  supportedInputTypes(): string[] { return ['application/json+s3-event']; }
  supportedOutputTypes(): string[] { return ['*/*']; }
  supportedComputeTypes(): ComputeType[] { return [ComputeType.CPU]; }
}

class VectorStoreBuilder extends MiddlewareBuilder {
  public build(): VectorStore { return new VectorStore(this.scope, this.identifier, this.props); }
}

export class VectorStore extends Middleware {
  static readonly Builder = VectorStoreBuilder;
  constructor(scope: Construct, id: string, props: MiddlewareProps) {
    super(scope, id, describe('vector-store'), props);
    this.grantPrincipal = role(this).grantPrincipal;
    super.bind();
  }
  grantReadProcessedDocuments(_: iam.IGrantable): iam.Grant { return {} as iam.Grant; }
  supportedInputTypes(): string[] { return ['*/*']; }
  supportedOutputTypes(): string[] { return []; }
  supportedComputeTypes(): ComputeType[] { return [ComputeType.CPU]; }
  override conditional() {
    return super.conditional()
      .and(when('type').equals('document-created'))
      .and(when('data.metadata.properties.attrs.embeddings.vectors').exists());
  }
}

export function trigger(scope: Construct, cache: CacheStorage, id = 'Trigger'): Trigger {
  return new Trigger.Builder().withScope(scope).withIdentifier(id).withCacheStorage(cache).build();
}
