//! Finds a key that stands twice in an object. Only the text shows it: a parsed value has the last one.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The path of the first key that stands twice, such as `git.upstreams[1].host`.
pub fn duplicate(text: &[u8]) -> Option<String> {
    let mut found = None;
    let _ = Walk {
        at: String::new(),
        found: &mut found,
    }
    .deserialize(&mut serde_json::Deserializer::from_slice(text));
    found
}

struct Walk<'f> {
    at: String,
    found: &'f mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let at = match self.at.as_str() {
                "" => key.clone(),
                above => format!("{above}.{key}"),
            };
            if !seen.insert(key) {
                *self.found = Some(at);
                return Err(A::Error::custom("found"));
            }
            map.next_value_seed(Walk {
                at,
                found: &mut *self.found,
            })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut index = 0;
        while items
            .next_element_seed(Walk {
                at: format!("{}[{index}]", self.at),
                found: &mut *self.found,
            })?
            .is_some()
        {
            index += 1;
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::duplicate;

    #[test]
    fn the_first_one_and_where_it_is() {
        let path = |text: &str| duplicate(text.as_bytes());
        assert_eq!(
            path(r#"{"a": {"b": [1, {"c": 1, "c": 2}]}}"#).unwrap(),
            "a.b[1].c"
        );
        assert_eq!(path(r#"{"a": -1, "b": 1.5, "a": null}"#).unwrap(), "a");
        assert_eq!(path(r#"[{"a": 1}, {"a": true}, "a"]"#), None);
        assert_eq!(path("{"), None);
    }
}
