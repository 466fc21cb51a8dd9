//! JSON's own kinds of values, with errors in JSON's own words. None takes many times the memory that its text does: what could
//! is counted as it is read.

use std::{fmt, marker::PhantomData, ops::Deref};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Unexpected, Visitor},
};
use serde_json::{Map, Value};

/// Any number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Number(pub f64);

/// A whole number; `2.0` is one too, as JSON does not tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Integer(pub i64);

/// A list of at most so many.
#[derive(Debug, Clone, PartialEq)]
pub struct List<T, const MOST: usize = { usize::MAX }>(pub Vec<T>);

impl<T, const MOST: usize> Deref for List<T, MOST> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number")
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Number, E> {
        Ok(Number(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Number, E> {
        Ok(Number(value as f64))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Number, E> {
        Ok(Number(value as f64))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }
}

struct IntegerVisitor;

/// Beyond this a double does not hold every whole number.
const EXACT_MOST: f64 = 9_007_199_254_740_992.0;

impl Visitor<'_> for IntegerVisitor {
    type Value = Integer;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Integer, E> {
        Ok(Integer(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Integer, E> {
        let number = i64::try_from(value).map_err(|_| E::custom(format!("{value} is above {}", i64::MAX)))?;
        Ok(Integer(number))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Integer, E> {
        if value.fract() == 0.0 && value.abs() <= EXACT_MOST {
            return Ok(Integer(value as i64));
        }
        Err(E::invalid_type(Unexpected::Float(value), &self))
    }
}

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IntegerVisitor)
    }
}

struct ListVisitor<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for ListVisitor<T, MOST> {
    type Value = List<T, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<List<T, MOST>, A::Error> {
        let mut list = Vec::new();
        extend(&mut list, values, MOST)?;
        Ok(List(list))
    }
}

/// Takes in what is left of a list that is to be no longer than that.
pub(super) fn extend<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    list: &mut Vec<T>,
    mut rest: A,
    most: usize,
) -> Result<(), A::Error> {
    while let Some(value) = rest.next_element()? {
        if list.len() >= most {
            return Err(Error::custom(format!("at most {most} may be given")));
        }
        list.push(value);
    }
    Ok(())
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for List<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

/// Values within a [`Small`] one, itself among them.
const PARTS_MOST: usize = 4096;

/// Any value of few parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Small(pub Value);

/// The same of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct SmallObject(pub Map<String, Value>);

impl<'de> Deserialize<'de> for Small {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Part(&mut { PARTS_MOST }).deserialize(deserializer).map(Small)
    }
}

impl<'de> Deserialize<'de> for SmallObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ObjectVisitor)
    }
}

struct ObjectVisitor;

impl<'de> Visitor<'de> for ObjectVisitor {
    type Value = SmallObject;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SmallObject, A::Error> {
        Part(&mut { PARTS_MOST }).object(map).map(SmallObject)
    }
}

/// One of a value's parts, and how many there may be from it on.
struct Part<'a>(&'a mut usize);

impl Part<'_> {
    fn counted<E: Error>(mut self, value: impl Into<Value>) -> Result<Value, E> {
        self.count().map(|()| value.into())
    }

    fn count<E: Error>(&mut self) -> Result<(), E> {
        let left = self.0.checked_sub(1);
        *self.0 = left.ok_or_else(|| E::custom(format!("more than {PARTS_MOST} values are in it")))?;
        Ok(())
    }

    fn object<'de, A: MapAccess<'de>>(mut self, mut access: A) -> Result<Map<String, Value>, A::Error> {
        self.count()?;
        let mut map = Map::new();
        while let Some(key) = access.next_key()? {
            map.insert(key, access.next_value_seed(Part(self.0))?);
        }
        Ok(map)
    }
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.counted(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.counted(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.counted(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.counted(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.counted(value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.counted(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Value, A::Error> {
        self.count()?;
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Part(self.0))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
        self.object(map).map(Value::Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_few_parts_is_read_as_any_and_one_of_many_is_not() {
        for json in [
            "null",
            "true",
            "-1",
            "18446744073709551615",
            "1.5",
            r#""a""#,
            r#"[1, {"a": [], "b": {"c": null}}]"#,
        ] {
            let value: Value = serde_json::from_str(json).expect(json);
            assert_eq!(serde_json::from_str::<Small>(json).expect(json).0, value);
        }
        let most = format!("[{}]", vec!["[]"; PARTS_MOST - 1].join(","));
        assert!(serde_json::from_str::<Small>(&most).is_ok());
        for many in [
            format!("[{}]", vec!["[]"; PARTS_MOST].join(",")),
            format!("[{}]", vec![r#"{"a": 1}"#; PARTS_MOST / 2].join(",")),
        ] {
            let error = serde_json::from_str::<Small>(&many).expect_err("too many").to_string();
            assert!(error.starts_with("more than 4096 values are in it"), "{error}");
            let within = format!(r#"{{"a": {many}}}"#);
            assert!(serde_json::from_str::<SmallObject>(&within).is_err());
        }
        let error = serde_json::from_str::<SmallObject>("[1]").expect_err("no object").to_string();
        assert!(error.contains("expected an object"), "{error}");
    }

    #[test]
    fn a_list_ends_where_it_has_as_many_as_it_may() {
        assert_eq!(serde_json::from_str::<List<Integer, 2>>("[1, 2]").expect("two").len(), 2);
        let error = serde_json::from_str::<List<Integer, 2>>("[1, 2, 3]").expect_err("three").to_string();
        assert!(error.starts_with("at most 2 may be given"), "{error}");
    }
}
