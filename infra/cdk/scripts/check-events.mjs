// Holds the events on standard input, a JSON array, against Lakechain's own SDK: the next middleware
// accepts each, and the pointer to the vector is still there when that passes it on.
import assert from 'node:assert/strict';
import { text } from 'node:stream/consumers';
import { CloudEvent } from '@project-lakechain/sdk/models';

const events = JSON.parse(await text(process.stdin));
assert.ok(events.length > 0, 'no events');
for (const event of events) {
  const { data } = JSON.parse(JSON.stringify(CloudEvent.from(JSON.stringify(event))));
  const embeddings = ({ metadata }) => metadata.properties?.attrs.embeddings;
  assert.deepEqual(embeddings(data), embeddings(event.data));
  for (const place of ['chainId', 'source', 'document', 'callStack']) assert.deepEqual(data[place], event.data[place]);
  assert.deepEqual(data.metadata.keywords, event.data.metadata.keywords);
}
