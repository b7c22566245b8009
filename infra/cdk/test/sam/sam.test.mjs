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
  const translated = execFileSync(tool('python'), ['tools/checks/translate.py', 'infra/template.yaml'], { cwd: REPOSITORY, encoding: 'utf8' });
  // SAM puts a digest of a layer into its logical id.
  const sam = parse(translated.replaceAll(/(\w+Layer)[0-9a-f]{10}\b/g, '$1'));
  const ours = JSON.parse(readFileSync(new URL('../../dist/template.json', import.meta.url), 'utf8'));
  for (const { Resources } of [sam, ours]) {
    for (const resource of Object.values(Resources)) {
      if (resource.Type === 'AWS::Lambda::LayerVersion') delete resource.Properties.Content;
      if (resource.Type !== 'AWS::Lambda::Function' || resource.Properties.Code.ZipFile) continue;
      // Where SAM uploads to, and who it says it is.
      delete resource.Properties.Code;
      delete resource.Properties.Tags;
    }
  }
  assert.deepEqual(ours, sam);
});

// `cargo xtask lint-infra` lints the plain construct; of the middleware's resources some are Lakechain's.
describe('the middleware', () => {
  const folder = mkdtempSync(join(tmpdir(), 'clip-lint-'));
  process.on('exit', () => rmSync(folder, { recursive: true }));
  const template = execFileSync(process.execPath, [fileURLToPath(new URL('../../scripts/example.mjs', import.meta.url)), 'lakechain'], { encoding: 'utf8' });
  const cfnLint = (text) => {
    const path = join(folder, 'template.json');
    writeFileSync(path, text);
    const { status, stdout, stderr, error } = spawnSync(tool('cfn-lint'), ['--regions', 'us-east-1', '--', path], { encoding: 'utf8', maxBuffer: 1 << 26 });
    if (error) throw error;
    return { status, said: stdout + stderr };
  };

  test('cfn-lint finds nothing in it', () => {
    const { status, said } = cfnLint(template);
    assert.equal(status, 0, said);
  });

  test('cfn-lint finds a mistyped action in it', () => {
    assert.match(cfnLint(template.replace('"sqs:GetQueueAttributes"', '"sqs:GetQueueAttribute"')).said, /getqueueattribute/i);
  });
});
