import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { scenario, UPSTREAM } from './consumer.mjs';

const { LAKECHAIN_CHECKOUT } = process.env;
const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'));

if (!LAKECHAIN_CHECKOUT || !existsSync(join(LAKECHAIN_CHECKOUT, UPSTREAM.upstream, 'dist/index.js'))) {
  after(() => console.log('not run: infra/cdk’s wiring against upstream’s middleware (LAKECHAIN_CHECKOUT names no checkout with it built)'));
} else {
  const { upstream, ours } = scenario(LAKECHAIN_CHECKOUT, 'upstream.ts');
  const resources = ({ Resources }, version) => JSON.parse(JSON.stringify(Resources).replaceAll(version, 'VERSION'));
  const [theirs, mine] = [resources(upstream, '0.10.0'), resources(ours, version)];
  /** What core and the neighbours made; the rest is each middleware's own machinery, and CDK's handlers. */
  const wiring = (all) => Object.fromEntries(Object.entries(all)
    .filter(([id]) => !/^(ClipCluster|ClipPipeline|ClipClipImage|Vpc|Custom|BucketNotifications|CDKMetadata)/.test(id)));

  test('wiring is upstream’s: the same resources but for the description', () => {
    const [left, right] = [wiring(theirs), wiring(mine)];
    assert.ok(Object.keys(left).length > 20);
    for (const all of [left, right]) {
      const [, description] = Object.entries(all).find(([id, { Type }]) => Type === 'AWS::SSM::Parameter' && /^Clipdescription/.test(id));
      delete description.Properties.Value;
    }
    assert.deepEqual(right, left);
  });

  test('the task has each grant that core gives upstream’s', () => {
    const granted = (all, role) => Object.values(all).filter(({ Type, Properties }) => Type === 'AWS::IAM::Policy'
      && Properties.Roles.some(({ Ref }) => role.test(Ref))).flatMap(({ Properties }) => Properties.PolicyDocument.Statement);
    const [left, right] = [granted(theirs, /^ClipCluster.*Task/), granted(mine, /^ClipPipelineTemplateTaskRole/)];
    const ofCore = left.filter(({ Resource }) => /Cache|TriggerImages/.test(JSON.stringify(Resource)));
    assert.equal(ofCore.length, 3, 'reading the source, reading the cache, writing its folder there');
    for (const statement of ofCore) assert.ok(right.some((one) => JSON.stringify(one) === JSON.stringify(statement)), JSON.stringify(statement));
  });

  test('what upstream grants the task besides, ours has in its role', () => {
    const { PolicyDocument } = Object.entries(mine).find(([id]) => /^ClipPipelineTemplateTaskRole/.test(id))[1].Properties.Policies[0];
    const actions = new Set(PolicyDocument.Statement.flatMap(({ Action }) => Action));
    for (const action of ['sqs:ReceiveMessage', 'sqs:DeleteMessage', 'sqs:ChangeMessageVisibility', 'sqs:GetQueueAttributes', 'sns:Publish']) {
      assert.ok(actions.has(action), action);
    }
  });
}
