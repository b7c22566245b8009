import { Token } from 'aws-cdk-lib';

/** A template, or a part of one, as JSON. */
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Fields = { [key: string]: Json };

interface Parameter {
  Type: string;
  Default?: string | number;
  AllowedPattern?: string;
  AllowedValues?: (string | number)[];
  ConstraintDescription?: string;
  MinValue?: number;
  MaxValue?: number;
  MaxLength?: number;
}

export interface Template {
  Parameters: { [name: string]: Parameter };
  Mappings: { [name: string]: { [key: string]: Fields } };
  Conditions: { [name: string]: Json };
  Rules?: { [name: string]: { Assertions: { Assert: Json; AssertDescription: string }[] } };
  Resources: { [id: string]: Fields };
}

/** What stands for a resource of the template that exists already, by attribute; `Ref` for its reference. */
export type Substitutes = { [id: string]: { [attribute: string]: string } };

/** A template for one deployment: nothing is left to choose, and what only CDK knows is a parameter. */
export interface Specialised {
  template: { Parameters: { [name: string]: Json }; Resources: { [id: string]: Json } };
  /** Values of the parameters that are left, but for those that CloudFormation reads from SSM. */
  parameters: { [name: string]: string | number };
}

/** Stands for `AWS::NoValue` until the property or element that it is can be left out. */
const NO_VALUE = Symbol('AWS::NoValue');

/**
 * Decides everything in a template that is known at synthesis: parameters, conditions and mappings.
 *
 * Two pipelines in one stack then bring no parameters of their own, a user sees what is deployed,
 * and a wrong value fails here by the template's own rules. A value that only CloudFormation knows
 * (a token) counts as given, that is, as unlike the empty string.
 *
 * @param stackName what the template takes for its stack's name, and makes physical names of
 */
export function specialise(
  source: Template,
  given: { [parameter: string]: string | number | undefined },
  substitutes: Substitutes,
  leftOut: string[] = [],
  stackName = '${AWS::StackName}',
): Specialised {
  const gone = new Set([...Object.keys(substitutes), ...leftOut]);
  const parameters: Specialised['parameters'] = {};
  const declared: { [name: string]: Json } = {};
  const known: { [name: string]: string | number } = {};

  for (const name of Object.keys(given)) {
    if (!source.Parameters[name]) throw new Error(`the template has no parameter ${name}`);
  }
  for (const [name, parameter] of Object.entries(source.Parameters)) {
    const value = given[name] ?? parameter.Default;
    if (value === undefined) throw new Error(`${name} is needed`);
    if (parameter.Type.startsWith('AWS::SSM::')) {
      declared[name] = { ...(parameter as unknown as Fields), Default: value };
    } else if (Token.isUnresolved(value)) {
      late(name, value);
    } else {
      check(name, parameter, value);
      known[name] = value;
    }
  }

  function late(name: string, value: string | number): Json {
    declared[name] = { Type: 'String' };
    parameters[name] = value;
    return { Ref: name };
  }

  function substitute(id: string, attribute: string): Json {
    const value = substitutes[id]?.[attribute];
    if (value === undefined) throw new Error(`the template uses ${attribute} of ${id}, for which nothing is given`);
    return late(`${id}${attribute.replaceAll('.', '')}`, value);
  }

  function condition(at: Json): boolean {
    if (typeof at === 'string') return condition(source.Conditions[at] ?? null);
    const [name, argument] = Object.entries((at ?? {}) as Fields)[0] ?? [];
    const all = (argument ?? []) as Json[];
    switch (name) {
      case 'Condition': return condition(argument as string);
      case 'Fn::Not': return !condition(all[0]!);
      case 'Fn::And': return all.every(condition);
      case 'Fn::Or': return all.some(condition);
      case 'Fn::Equals': return equal(all);
      case 'Fn::Contains': return (all[0] as Json[]).some((one) => equal([one, all[1]!]));
      default: throw new Error(`cannot decide the condition ${JSON.stringify(at)}`);
    }
  }

  function equal(sides: Json[]): boolean {
    const [left, right] = sides.map((side) => {
      const value = resolve(side);
      return typeof value === 'object' ? undefined : String(value);
    });
    if (left !== undefined && right !== undefined) return left === right;
    // A token: something, though nobody knows what.
    if (left === '' || right === '') return false;
    throw new Error(`${JSON.stringify(sides)} must be decided at synthesis, so its value cannot be a token`);
  }

  function fields(at: Fields): Fields {
    const entries = Object.entries(at).map(([key, value]) => [key, resolve(value)] as const);
    return Object.fromEntries(entries.filter(([, value]) => value !== NO_VALUE)) as Fields;
  }

  function resolve(at: Json): Json | typeof NO_VALUE {
    if (Array.isArray(at)) return at.map(resolve).filter((value): value is Json => value !== NO_VALUE);
    if (!(at instanceof Object)) return at;
    const [name, argument] = Object.entries(at)[0] ?? [];
    switch (name) {
      case 'Ref': return reference(argument as string);
      case 'Fn::If': {
        const [test, yes, no] = argument as [string, Json, Json];
        return resolve(condition(test) ? yes : no);
      }
      case 'Fn::FindInMap': {
        const [map, key, field] = (argument as Json[]).map((part) => String(resolve(part)));
        const value = source.Mappings[map!]?.[key!]?.[field!];
        if (value === undefined) throw new Error(`the mapping ${map} has no ${field} of ${key}`);
        return value;
      }
      case 'Fn::GetAtt': {
        const [id, attribute] = argument as [string, string];
        return gone.has(id) ? substitute(id, attribute) : at;
      }
      case 'Fn::Sub': return sub(argument!);
      default: return fields(at);
    }
  }

  function reference(name: string): Json | typeof NO_VALUE {
    if (name === 'AWS::NoValue') return NO_VALUE;
    if (name === 'AWS::StackName') return { 'Fn::Sub': stackName };
    if (name in known) return known[name]!;
    return gone.has(name) ? substitute(name, 'Ref') : { Ref: name };
  }

  /** Writes known values into the text; what is neither known nor the template's own becomes a variable of it. */
  function sub(argument: Json): Json {
    const [text, own] = (typeof argument === 'string' ? [argument, {}] : argument) as [string, Fields];
    const given = fields(own);
    const variables: Fields = {};
    const written = text.replaceAll('${AWS::StackName}', () => stackName).replace(/\$\{([^!][^}]*)\}/g, (whole, name: string) => {
      const [id, ...attribute] = name.split('.');
      let value: Json | typeof NO_VALUE;
      if (name in given) value = given[name]!;
      else if (attribute.length) value = gone.has(id!) ? substitute(id!, attribute.join('.')) : { 'Fn::GetAtt': [id!, attribute.join('.')] };
      else value = reference(name);
      if (typeof value === 'string' || typeof value === 'number') return String(value);
      const stays = !(name in given) && !gone.has(id!) && !(name in parameters);
      if (stays) return whole;
      const variable = name.replaceAll(/\W/g, '');
      variables[variable] = value as Json;
      return `\${${variable}}`;
    });
    if (Object.keys(variables).length) return { 'Fn::Sub': [written, variables] };
    return /\$\{[^!]/.test(written) ? { 'Fn::Sub': written } : written;
  }

  for (const { Assert, AssertDescription } of Object.values(source.Rules ?? {}).flatMap(({ Assertions }) => Assertions)) {
    if (!condition(Assert)) throw new Error(AssertDescription);
  }
  const resources = Object.entries(source.Resources)
    .filter(([id, { Condition: test }]) => !gone.has(id) && (test === undefined || condition(test)));
  const kept = new Set(resources.map(([id]) => id));
  const Resources = Object.fromEntries(resources.map(([id, { Condition: _, DependsOn, ...rest }]) => {
    const after = [DependsOn ?? []].flat().filter((other) => kept.has(other as string));
    return [id, fields(after.length ? { ...rest, DependsOn: after } : rest)];
  }));
  return { template: { Parameters: declared, Resources }, parameters };
}

/** The template's own rules for a value; CloudFormation would apply them to a parameter. */
function check(name: string, rule: Parameter, value: string | number): void {
  const refuse = (what: string): never => {
    throw new Error(`${name} is ${JSON.stringify(value)}, but must be ${rule.ConstraintDescription ?? what}`);
  };
  if (rule.AllowedValues && !rule.AllowedValues.map(String).includes(String(value))) {
    refuse(`one of ${rule.AllowedValues.join(', ')}`);
  }
  if (rule.AllowedPattern && !new RegExp(`^(?:${rule.AllowedPattern})$`).test(String(value))) refuse(`like ${rule.AllowedPattern}`);
  if (rule.MaxLength !== undefined && String(value).length > rule.MaxLength) refuse(`at most ${rule.MaxLength} characters`);
  if (rule.Type !== 'Number') return;
  if (typeof value !== 'number' || Number.isNaN(value)) refuse('a number');
  if (rule.MinValue !== undefined && Number(value) < rule.MinValue) refuse(`at least ${rule.MinValue}`);
  if (rule.MaxValue !== undefined && Number(value) > rule.MaxValue) refuse(`at most ${rule.MaxValue}`);
}
