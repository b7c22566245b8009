// Needs the Python environment that INFRA_TOOLS names (infra/requirements.txt).
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';

const REPOSITORY = fileURLToPath(new URL('../../../..', import.meta.url));
const { INFRA_TOOLS } = process.env;
assert.ok(INFRA_TOOLS, 'INFRA_TOOLS must name the Python environment with infra/requirements.txt');
const tool = (name) => resolve(REPOSITORY, INFRA_TOOLS, 'bin', name);

test('the package’s template is what SAM makes of infra/template.yaml', () => {
  const sam = parse(execFileSync(tool('python'), ['tools/checks/translate.py', 'infra/template.yaml'], { cwd: REPOSITORY, encoding: 'utf8' }));
  const ours = JSON.parse(readFileSync(new URL('../../dist/template.json', import.meta.url), 'utf8'));
  for (const { Resources } of [sam, ours]) {
    for (const resource of Object.values(Resources)) {
      if (resource.Type !== 'AWS::Lambda::Function' || resource.Properties.Code.ZipFile) continue;
      // Where SAM uploads to, and who it says it is.
      delete resource.Properties.Code;
      delete resource.Properties.Tags;
    }
  }
  assert.deepEqual(ours, sam);
});

describe('linters', () => {
  const folder = mkdtempSync(join(tmpdir(), 'clip-lint-'));
  process.on('exit', () => rmSync(folder, { recursive: true }));
  const synthesise = (kind) => {
    const path = join(folder, `${kind}.json`);
    writeFileSync(path, execFileSync(process.execPath, [fileURLToPath(new URL('../../scripts/example.mjs', import.meta.url)), kind]));
    return path;
  };
  const run = (program, ...args) => {
    const { status, stdout, stderr, error } = spawnSync(tool(program), args, { encoding: 'utf8', maxBuffer: 1 << 26 });
    if (error) throw error;
    return { status, said: stdout + stderr };
  };
  // CDK's own function for bucket notifications says an order twice.
  const cfnLint = (path) => run('cfn-lint', '--regions', 'us-east-1', '--ignore-checks', 'W3005', '--', path);

  for (const kind of ['pipeline', 'lakechain']) {
    const path = synthesise(kind);

    test(`cfn-lint finds nothing in the synthesised ${kind}`, () => {
      const { status, said } = cfnLint(path);
      assert.equal(status, 0, said);
    });

    test(`cfn-lint finds a mistyped action in the ${kind}`, () => {
      const seeded = join(folder, `${kind}-seeded.json`);
      writeFileSync(seeded, readFileSync(path, 'utf8').replace('"sqs:GetQueueAttributes"', '"sqs:GetQueueAttribute"'));
      assert.match(cfnLint(seeded).said, /getqueueattribute/i);
    });
  }
});
