// A folder of somebody who uses the packed package: it, aws-cdk-lib, TypeScript, and one of the cores.
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('..', import.meta.url));
const OWN = join(ROOT, 'node_modules');
const SHARED = ['aws-cdk-lib', 'constructs', '@types/node', 'undici-types'];

export function run(program, args, options = {}) {
  try {
    return execFileSync(program, args, { encoding: 'utf8', maxBuffer: 1 << 28, stdio: ['ignore', 'pipe', 'pipe'], ...options });
  } catch (error) {
    throw new Error(`${[program, ...args].join(' ')}\n${error.stdout}\n${error.stderr}`);
  }
}

/** The three examples of the README, wrapped in what they leave out, and the first with what the others say. */
function pageExamples() {
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
  const blocks = [...readme.matchAll(/<!-- page -->\n```ts\n(.*?)```/gs)].map(([, code]) => code);
  if (blocks.length !== 3) throw new Error(`the README has ${blocks.length} of the page's examples, not 3`);
  const [whole, ...chains] = blocks;
  const rest = chains.map((chain, index) => {
    const imports = chain.match(/^import .*$/gm)?.join('\n') ?? "import { ClipImageProcessor } from '@project-lakechain/clip-image-processor';";
    return `${imports}
import * as cdk from 'aws-cdk-lib';
import * as ec2 from 'aws-cdk-lib/aws-ec2';
import { CacheStorage } from '@project-lakechain/core';
import { trigger } from './middlewares';
export class Stack${index + 2} extends cdk.Stack {
  constructor(scope: cdk.App, id: string) {
    super(scope, id);
    const vpc = new ec2.Vpc(this, 'Vpc', {});
    const cache = new CacheStorage(this, 'Cache');
    const source = trigger(this, cache);
    ${chain.replace(/^import .*$/gm, '')}
    void clipProcessor;
  }
}`;
  });
  const large = whole.replace('ClipImageProcessor }', 'ClipImageProcessor, ClipModel }')
    .replace('.withSource(source)', '.withSource(source).withModel(ClipModel.VIT_L_14).withMaxInstances(10)');
  const index = `import { App } from 'aws-cdk-lib';
import { Stack } from './page1';
import { Stack as Large } from './page1-large';
import { Stack2 } from './page2';
import { Stack3 } from './page3';
export function stacks(app: App): void {
  new Stack(app, 'Page1');
  new Large(app, 'Page1Large');
  new Stack2(app, 'Page2');
  new Stack3(app, 'Page3');
}`;
  const source = "export { trigger as imagesOf } from './middlewares';";
  return { 'page.ts': index, 'page1.ts': whole, 'page1-large.ts': large, 'page2.ts': rest[0], 'page3.ts': rest[1], 'images.ts': source };
}

/** Upstream's own middleware in a checkout, and what it needs besides core. */
export const UPSTREAM = {
  upstream: 'packages/middlewares/embedding-processors/clip-image-processor',
  '@project-lakechain/ecs-cluster': 'packages/constructs/ecs-cluster',
};

function link(from, to) {
  mkdirSync(dirname(to), { recursive: true });
  if (!existsSync(to)) symlinkSync(from, to);
}

/** core as built in a checkout of Lakechain, with its own dependencies but our aws-cdk-lib. */
function installReal(checkout, modules) {
  const core = join(checkout, 'packages/core');
  if (!existsSync(join(core, 'dist/index.js'))) throw new Error(`${core} is not built: run npm install and npx tsc there`);
  for (const [name, path] of Object.entries({ '@project-lakechain/core': 'packages/core', ...UPSTREAM })) {
    for (const part of ['dist', 'package.json'].map((part) => join(path, part)).filter((part) => existsSync(join(checkout, part)))) {
      cpSync(join(checkout, part), join(modules, name, basename(part)), { recursive: true });
    }
  }
  for (const folder of [join(checkout, 'node_modules'), join(core, 'node_modules')].filter(existsSync)) {
    for (const name of readdirSync(folder).filter((name) => /^([a-z]|.bin$)/.test(name))) link(join(folder, name), join(modules, name));
  }
}

/**
 * Installs the package, type-checks the scenario strictly, and runs it.
 * @param core `none`, `contract` (our stand-in), or a checkout of Lakechain
 */
export function scenario(core, file) {
  const folder = mkdtempSync(join(tmpdir(), 'clip-consumer-'));
  try {
    const modules = join(folder, 'node_modules');
    const [{ filename }] = JSON.parse(run('npm', ['pack', '--ignore-scripts', '--json', '--pack-destination', folder], { cwd: ROOT }));
    mkdirSync(join(modules, 'clip-image-processor'), { recursive: true });
    run('tar', ['xzf', join(folder, filename), '-C', join(modules, 'clip-image-processor'), '--strip-components=1']);
    for (const name of SHARED) link(join(OWN, name), join(modules, name));
    if (core !== 'none') {
      // npm install @project-lakechain/clip-image-processor@npm:clip-image-processor
      link(join(modules, 'clip-image-processor'), join(modules, '@project-lakechain/clip-image-processor'));
      if (core === 'contract') cpSync(join(ROOT, 'test/core'), join(modules, '@project-lakechain/core'), { recursive: true });
      else installReal(core, modules);
      // Upstream's functions look for one even when they are not bundled.
      writeFileSync(join(folder, 'package-lock.json'), '{}');
      for (const [name, text] of Object.entries(pageExamples())) writeFileSync(join(folder, name), text);
      cpSync(join(ROOT, 'test/scenarios/middlewares.ts'), join(folder, 'middlewares.ts'));
    }
    cpSync(join(ROOT, 'test/scenarios', file), join(folder, file));
    run(process.execPath, [join(OWN, 'typescript/bin/tsc'), '--strict', '--skipLibCheck', '--target', 'es2022', '--types', 'node',
      '--module', 'node16', '--moduleResolution', 'node16', join(folder, file)], { cwd: folder });
    const env = { ...process.env, CDK_OUTDIR: join(folder, 'cdk.out') };
    return JSON.parse(run(process.execPath, [join(folder, file.replace(/ts$/, 'js'))], { cwd: folder, env }));
  } finally {
    rmSync(folder, { recursive: true });
  }
}
