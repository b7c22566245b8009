// What CloudFormation would make of a template, as far as a comparison needs it: parameters, conditions, mappings and
// text are worked out; a reference to a resource or to AWS itself becomes its name in angle brackets.

const NOTHING = Symbol('AWS::NoValue');

/**
 * @param template with CloudFormation's long forms
 * @param values of its parameters
 * @param nameOf the name of a resource, by its logical id
 * @returns each resource that is made, by its name
 */
export function evaluate(template, values, nameOf = (id) => id) {
  const parameters = Object.fromEntries(Object.entries(template.Parameters ?? {})
    .map(([name, { Type, Default }]) => [name, Type.startsWith('AWS::SSM') ? `<${nameOf(name)}>` : values[name] ?? Default]));

  const holds = (name) => Boolean(of(template.Conditions[name]));
  const ref = (name) => {
    if (name === 'AWS::NoValue') return NOTHING;
    return name in parameters ? String(parameters[name]) : `<${name.startsWith('AWS::') ? name : nameOf(name)}>`;
  };
  const att = (id, attribute) => `<${nameOf(id)}.${attribute}>`;
  const intrinsics = {
    Ref: ref,
    Condition: holds,
    'Fn::GetAtt': (to) => att(...(Array.isArray(to) ? to : to.split('.'))),
    'Fn::If': ([name, yes, no]) => of(holds(name) ? yes : no),
    'Fn::Equals': ([a, b]) => of(a) === of(b),
    'Fn::Not': ([a]) => !of(a),
    'Fn::Or': (all) => all.map(of).some(Boolean),
    'Fn::And': (all) => all.map(of).every(Boolean),
    'Fn::FindInMap': (path) => String(path.map(of).reduce((at, key) => at[key], template.Mappings)),
    'Fn::Join': ([by, parts]) => of(parts).join(by),
    'Fn::Split': ([by, text]) => of(text).split(by),
    'Fn::Select': ([index, list]) => of(list)[index],
    'Fn::Sub': (argument) => {
      const [text, own] = Array.isArray(argument) ? argument : [argument, {}];
      return text.replaceAll(/\$\{([^!}]+)\}/g, (_, name) => {
        if (name in own) return of(own[name]);
        const dot = name.indexOf('.');
        return dot < 0 ? ref(name) : att(name.slice(0, dot), name.slice(dot + 1));
      });
    },
  };

  function of(value) {
    if (Array.isArray(value)) return value.map(of).filter((one) => one !== NOTHING);
    if (!(value instanceof Object)) return value === null ? value : String(value);
    const [name, ...others] = Object.keys(value);
    if (!others.length && name in intrinsics) return intrinsics[name](value[name]);
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, of(one)]).filter(([, one]) => one !== NOTHING));
  }

  const made = Object.entries(template.Resources).filter(([, { Condition }]) => !Condition || holds(Condition));
  const ids = new Set(made.map(([id]) => id));
  return Object.fromEntries(made.map(([id, { Condition, Metadata, DependsOn = [], ...rest }]) => {
    const after = [DependsOn].flat().filter((other) => ids.has(other)).map(nameOf).sort();
    return [nameOf(id), { ...of(rest), DependsOn: after }];
  }));
}
