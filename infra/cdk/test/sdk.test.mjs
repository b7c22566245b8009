import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { ROOT } from './consumer.mjs';

const sample = (name) => JSON.parse(readFileSync(join(ROOT, `../../events/samples/${name}.json`), 'utf8'));
const check = (events) => spawnSync(process.execPath, [join(ROOT, 'scripts/check-events.mjs')], { input: JSON.stringify(events), encoding: 'utf8' });

test('Lakechain’s SDK takes the events of the samples', () => {
  const { status, stderr } = check(['output-cloudevent', 'cloudevent-created', 'cloudevent-deleted'].map(sample));
  assert.equal(status, 0, stderr);
});

test('and not those that it must not get: the standard form, another kind, a vector without a model', () => {
  const withProperties = (properties) => ({ ...sample('cloudevent-created'), data: { ...sample('cloudevent-created').data, metadata: { properties } } });
  for (const [event, says] of [
    [sample('output-standard'), /unrecognized_keys/],
    [withProperties({ kind: 'picture', attrs: {} }), /invalid_union_discriminator/],
    [withProperties({ kind: 'text', attrs: { embeddings: { vectors: 's3://b/ab.json', dimensions: 512 } } }), /"model"/],
  ]) {
    const { status, stderr } = check([event]);
    assert.notEqual(status, 0);
    assert.match(stderr, says);
  }
});
