//! Conditions and intrinsic functions.

use std::cell::Cell;

use serde_json::{Map, Value, json};

use crate::{Parameters, Surroundings, TemplateError, list, members, text_of};

/// How deep conditions may name each other; deeper is a circle.
const MAX_CONDITIONS: usize = 100;

pub(crate) struct Resolver<'a> {
    root: &'a Value,
    parameters: &'a Parameters,
    surroundings: &'a dyn Surroundings,
    conditions: Cell<usize>,
}

impl<'a> Resolver<'a> {
    pub fn new(
        root: &'a Value,
        parameters: &'a Parameters,
        surroundings: &'a dyn Surroundings,
    ) -> Self {
        Self {
            root,
            parameters,
            surroundings,
            conditions: Cell::new(0),
        }
    }

    /// The value with its functions carried out; null for `AWS::NoValue`.
    pub fn resolve(&self, value: &Value, place: &str) -> Result<Value, TemplateError> {
        Ok(self.value(value, place)?.unwrap_or_default())
    }

    /// None for `AWS::NoValue`, which takes a member or an item away.
    fn value(&self, value: &Value, place: &str) -> Result<Option<Value>, TemplateError> {
        match value {
            Value::Array(items) => {
                let mut resolved = Vec::with_capacity(items.len());
                for item in items {
                    resolved.extend(self.value(item, place)?);
                }
                Ok(Some(Value::Array(resolved)))
            }
            Value::Object(entries) => {
                if let Some((name, argument)) = function_of(entries) {
                    return self.function(name, argument, place);
                }
                let mut resolved = Map::new();
                for (name, entry) in entries {
                    if let Some(entry) = self.value(entry, &format!("{place}.{name}"))? {
                        resolved.insert(name.clone(), entry);
                    }
                }
                Ok(Some(Value::Object(resolved)))
            }
            scalar => Ok(Some(scalar.clone())),
        }
    }

    fn function(
        &self,
        name: &str,
        argument: &Value,
        place: &str,
    ) -> Result<Option<Value>, TemplateError> {
        let wrong = || TemplateError::Function {
            place: place.to_owned(),
            function: format!("{name} {argument}"),
        };
        match (name, argument) {
            ("Ref", Value::String(target)) if target == "AWS::NoValue" => return Ok(None),
            ("Ref", Value::String(target)) => return self.reference(target, place).map(Some),
            ("Fn::GetAtt", Value::String(path)) => {
                let (target, attribute) = path.split_once('.').ok_or_else(wrong)?;
                return self.attribute(target, attribute, place).map(Some);
            }
            ("Fn::GetAtt", Value::Array(parts)) => {
                let [Value::String(target), attribute] = &parts[..] else {
                    return Err(wrong());
                };
                let attribute = text_of(&self.resolve(attribute, place)?);
                return self.attribute(target, &attribute, place).map(Some);
            }
            ("Fn::Sub", _) => return self.substitute(argument, place).map(Some),
            ("Fn::If", Value::Array(parts)) => {
                let [Value::String(condition), yes, no] = &parts[..] else {
                    return Err(wrong());
                };
                let holds = self.condition(condition, place)?;
                return self.value(if holds { yes } else { no }, place);
            }
            ("Condition" | "Fn::Equals" | "Fn::And" | "Fn::Or" | "Fn::Not", _) => {
                return Ok(Some(json!(self.holds(&json!({ name: argument }), place)?)));
            }
            _ => {}
        }
        let argument = self.value(argument, place)?.ok_or_else(wrong)?;
        if is_open(&argument) {
            return Ok(Some(json!({ name: argument })));
        }
        let done = match (name, argument.as_array().map_or(&[][..], Vec::as_slice)) {
            ("Fn::Join", [separator, items]) => {
                let items: Vec<String> = list(items).into_iter().map(text_of).collect();
                json!(items.join(&text_of(separator)))
            }
            ("Fn::Select", [index, items]) => {
                let index = text_of(index).parse::<usize>().map_err(|_| wrong())?;
                items.get(index).cloned().ok_or_else(wrong)?
            }
            ("Fn::Split", [separator, text]) => {
                let text = text_of(text);
                json!(text.split(text_of(separator).as_str()).collect::<Vec<_>>())
            }
            ("Fn::FindInMap", [map, first, second, ..]) => {
                let found = &self.root["Mappings"][text_of(map)][text_of(first)][text_of(second)];
                Some(found.clone())
                    .filter(|found| !found.is_null())
                    .ok_or_else(wrong)?
            }
            ("Fn::GetAZs", _) => match self.surroundings.pseudo("Region") {
                Some(region) => json!(["a", "b", "c"].map(|zone| format!("{region}{zone}"))),
                None => json!({ name: argument }),
            },
            ("Fn::Base64", _) => argument,
            ("Fn::ToJsonString", _) => json!(argument.to_string()),
            _ => return Err(wrong()),
        };
        Ok(Some(done))
    }

    fn reference(&self, target: &str, place: &str) -> Result<Value, TemplateError> {
        if let Some(value) = self.parameters.get(target) {
            return Ok(json!(value));
        }
        let known = match target.strip_prefix("AWS::") {
            Some(pseudo) => self.surroundings.pseudo(pseudo),
            None => self
                .surroundings
                .reference(target, self.kind(target, place)?),
        };
        Ok(known.map_or_else(|| json!({ "Ref": target }), Value::String))
    }

    fn attribute(
        &self,
        target: &str,
        attribute: &str,
        place: &str,
    ) -> Result<Value, TemplateError> {
        let kind = self.kind(target, place)?;
        let known = self.surroundings.attribute(target, kind, attribute);
        Ok(known.map_or_else(
            || json!({ "Fn::GetAtt": [target, attribute] }),
            Value::String,
        ))
    }

    fn kind(&self, target: &str, place: &str) -> Result<&str, TemplateError> {
        match self.root["Resources"].get(target) {
            Some(resource) => Ok(resource["Type"].as_str().unwrap_or_default()),
            None => Err(TemplateError::UnknownReference {
                place: place.to_owned(),
                name: target.to_owned(),
            }),
        }
    }

    /// `${Name}`, `${Name.Attribute}`, `${!literal}`, and names of its own map.
    /// Text when everything in it is known, otherwise a shorter `Fn::Sub`.
    fn substitute(&self, argument: &Value, place: &str) -> Result<Value, TemplateError> {
        let wrong = || TemplateError::Function {
            place: place.to_owned(),
            function: format!("Fn::Sub {argument}"),
        };
        let (pattern, own) = match argument {
            Value::String(pattern) => (pattern, None),
            Value::Array(parts) => match &parts[..] {
                [Value::String(pattern), Value::Object(own)] => (pattern, Some(own)),
                _ => return Err(wrong()),
            },
            _ => return Err(wrong()),
        };
        // `${!x}` is `${x}` in text and has to stay as it is in a Fn::Sub.
        let (mut text, mut shorter, mut is_known) = (String::new(), String::new(), true);
        let mut left = Map::new();
        let mut rest = pattern.as_str();
        while let Some((before, after)) = rest.split_once("${") {
            let (name, after) = after.split_once('}').ok_or_else(wrong)?;
            rest = after;
            text.push_str(before);
            shorter.push_str(before);
            if let Some(literal) = name.strip_prefix('!') {
                text.push_str(&format!("${{{literal}}}"));
                shorter.push_str(&format!("${{{name}}}"));
                continue;
            }
            let name = name.trim();
            let value = match (own.and_then(|own| own.get(name)), name.split_once('.')) {
                (Some(value), _) => self.resolve(value, place)?,
                (None, Some((target, attribute))) => self.attribute(target, attribute, place)?,
                (None, None) => self.reference(name, place)?,
            };
            if is_open(&value) {
                is_known = false;
                shorter.push_str(&as_substitution(&value).unwrap_or_else(|| {
                    left.insert(name.to_owned(), value);
                    format!("${{{name}}}")
                }));
            } else {
                text.push_str(&text_of(&value));
                shorter.push_str(&text_of(&value));
            }
        }
        Ok(match (is_known, left.is_empty()) {
            (true, _) => json!(text + rest),
            (false, true) => json!({ "Fn::Sub": shorter + rest }),
            (false, false) => json!({ "Fn::Sub": [shorter + rest, left] }),
        })
    }

    pub fn condition(&self, name: &str, place: &str) -> Result<bool, TemplateError> {
        let condition = &self.root["Conditions"][name];
        let depth = self.conditions.get();
        if condition.is_null() || depth > MAX_CONDITIONS {
            return Err(TemplateError::UnknownReference {
                place: place.to_owned(),
                name: name.to_owned(),
            });
        }
        self.conditions.set(depth + 1);
        let holds = self.holds(condition, name);
        self.conditions.set(depth);
        holds
    }

    fn holds(&self, condition: &Value, place: &str) -> Result<bool, TemplateError> {
        let wrong = || TemplateError::Function {
            place: place.to_owned(),
            function: condition.to_string(),
        };
        let (name, argument) = members(condition).next().ok_or_else(wrong)?;
        let mut parts = list(argument)
            .into_iter()
            .map(|part| self.holds(part, place));
        match (name.as_str(), argument) {
            ("Condition", Value::String(name)) => self.condition(name, place),
            ("Fn::Equals", Value::Array(sides)) => {
                let [left, right] = &sides[..] else {
                    return Err(wrong());
                };
                Ok(text_of(&self.resolve(left, place)?) == text_of(&self.resolve(right, place)?))
            }
            ("Fn::Not", _) => parts.next().ok_or_else(wrong)?.map(|holds| !holds),
            ("Fn::And", _) => parts.try_fold(true, |all, one| Ok(all & one?)),
            ("Fn::Or", _) => parts.try_fold(false, |any, one| Ok(any | one?)),
            _ => Err(wrong()),
        }
    }
}

/// The function that an object stands for. `Condition` is one only in
/// conditions: a policy's statement has a member of that name, too.
fn function_of(entries: &Map<String, Value>) -> Option<(&str, &Value)> {
    let (name, argument) = entries.iter().next().filter(|_| entries.len() == 1)?;
    let is_function =
        name == "Ref" || name.starts_with("Fn::") || (name == "Condition" && argument.is_string());
    is_function.then_some((name, argument))
}

/// Whether something in the value is known only after a deployment.
fn is_open(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(is_open),
        Value::Object(entries) => function_of(entries).is_some() || entries.values().any(is_open),
        _ => false,
    }
}

/// How a value that is not known yet is written inside a `Fn::Sub`.
fn as_substitution(value: &Value) -> Option<String> {
    if let Some(target) = value["Ref"].as_str() {
        return Some(format!("${{{target}}}"));
    }
    if let [target, attribute] = list(&value["Fn::GetAtt"])[..] {
        return Some(format!("${{{}.{}}}", text_of(target), text_of(attribute)));
    }
    value["Fn::Sub"].as_str().map(str::to_owned)
}
