// Makes from infra/template.yaml what the package is built on: dist/template.json
// (the template without SAM) and src/parameters.ts (its parameters as a type).
//
// SAM's own translator is a gigabyte of Python. The template uses two things of
// it, functions without events and layers, so those alone are translated here, and
// anything else is refused. `npm run test:sam` compares the result with SAM's.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import { isMap, isScalar, isSeq, parseDocument } from 'yaml';

const template = new URL('../../template.yaml', import.meta.url);

/** The YAML node with CloudFormation's short forms (!Ref, !Sub, …) written out. */
function plain(node) {
  let value;
  if (isMap(node)) {
    value = Object.fromEntries(node.items.map(({ key, value }) => [String(key.value), plain(value)]));
  } else if (isSeq(node)) {
    value = node.items.map(plain);
  } else {
    value = isScalar(node) ? node.value : null;
  }
  if (!node?.tag?.startsWith('!')) return value;
  const name = node.tag.slice(1);
  if (name === 'GetAtt' && typeof value === 'string') {
    const dot = value.indexOf('.');
    value = [value.slice(0, dot), value.slice(dot + 1)];
  }
  return { [name === 'Ref' || name === 'Condition' ? name : `Fn::${name}`]: value };
}

function withoutSam({ Transform, Globals = {}, ...rest }) {
  const unknown = Object.keys(Globals).filter((key) => key !== 'Function');
  if (unknown.length) throw new Error(`the template's Globals have ${unknown}, which cannot be translated here`);
  const resources = Object.entries(rest.Resources).map(([id, resource]) => {
    if (!resource.Type.startsWith('AWS::Serverless::')) return [id, resource];
    if (resource.Type === 'AWS::Serverless::LayerVersion') {
      const { ContentUri, RetentionPolicy, ...properties } = resource.Properties;
      const Properties = { Content: { S3Key: `${id}.zip` }, LayerName: id, ...properties };
      const { Metadata, ...rest } = resource;
      return [id, { ...rest, Type: 'AWS::Lambda::LayerVersion', DeletionPolicy: RetentionPolicy, Properties }];
    }
    const { CodeUri, Events, Policies, ...properties } = { ...Globals.Function, ...resource.Properties };
    if (resource.Type !== 'AWS::Serverless::Function' || !CodeUri || !properties.Role || Events || Policies) {
      throw new Error(`${id}: only functions with CodeUri and Role, without Events and Policies, can be translated here`);
    }
    // The name of the program's package; the construct says where it lies.
    const Code = { S3Key: `${basename(CodeUri)}.zip` };
    return [id, { ...resource, Type: 'AWS::Lambda::Function', Properties: { Code, ...properties } }];
  });
  return { ...rest, Resources: Object.fromEntries(resources) };
}

function typeOf({ Type, AllowedValues }) {
  if (AllowedValues) return AllowedValues.map((value) => (typeof value === 'string' ? `'${value}'` : value)).join(' | ');
  return Type === 'Number' ? 'number' : 'string';
}

function declaration(name, parameter) {
  const said = parameter.Description.trim().replaceAll('*/', '* /');
  const fallback = 'Default' in parameter ? `\n   * @default ${JSON.stringify(parameter.Default)}` : '';
  return `  /**\n   * ${said}${fallback}\n   */\n  readonly ${name}?: ${typeOf(parameter)};\n`;
}

const document = parseDocument(readFileSync(template, 'utf8'), { logLevel: 'error' });
if (document.errors.length) throw document.errors[0];
const translated = withoutSam(plain(document.contents));
mkdirSync(new URL('../dist', import.meta.url), { recursive: true });
writeFileSync(new URL('../dist/template.json', import.meta.url), JSON.stringify(translated, null, 1));
writeFileSync(
  new URL('../src/parameters.ts', import.meta.url),
  '// Made by scripts/generate.mjs from infra/template.yaml.\n\n'
    + '/** The parameters of the deployment\'s template. */\n'
    + `export interface TemplateParameters {\n${
      Object.entries(translated.Parameters).map(([name, parameter]) => declaration(name, parameter)).join('\n')}}\n`,
);
