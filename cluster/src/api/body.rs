//! JSON bodies: bounded before they are read, and every wrong field named at once.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use blixard_api::{BODY_BYTES_MAX, Detail};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::{Failure, detail};

/// Most wrong fields that are reported.
const DETAILS_MAX: usize = 32;

/// What is possible where serde only knows the width of a number.
const RANGES: &[(&str, &str)] = &[
    ("spec.vcpus", "1 to 32 are possible"),
    ("spec.memory_mib", "32 to the memory of the node are possible, in MiB"),
    ("spec.disk_mib", "16 to 16777216 are possible, in MiB"),
    ("grace_ms", "a number of milliseconds is needed"),
    ("id", "26 characters of Crockford base 32 (a ULID) are needed"),
];

/// Reads a JSON body of at most [`BODY_BYTES_MAX`] bytes. A longer one is refused at its `Content-Length`, or as soon as
/// the limit is passed, and not read on.
///
/// # Errors
/// 408, 413 or 400.
pub async fn read(headers: &HeaderMap, body: Body) -> Result<Vec<u8>, Failure> {
    let too_large = || {
        Failure::too_large(format!("a JSON body has at most {BODY_BYTES_MAX} bytes"))
            .suggest("images and kernels have their own requests: POST /v1/images, POST /v1/kernels")
    };
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced
        .is_some_and(|n| usize::try_from(n).is_ok_and(|n| n > BODY_BYTES_MAX) || n > u64::from(u32::MAX))
    {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(super::BODY_TIME_MAX, Limited::new(body, BODY_BYTES_MAX).collect());
    match collected.await {
        Ok(Ok(collected)) => Ok(collected.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Failure::malformed(format!("the body ended early: {error}"))),
        Err(_) => Err(Failure::timeout("the body did not arrive in time")),
    }
}

/// The value in these bytes, or its wrong fields. The value is still there when some fields were wrong but could be left
/// out, so that the caller can look for more.
pub struct Parsed<T> {
    /// The value, when it could be read, without the wrong fields.
    pub value: Option<T>,
    /// Wrong fields.
    pub details: Vec<Detail>,
}

impl<T> Parsed<T> {
    /// The value, when nothing was wrong.
    ///
    /// # Errors
    /// 422.
    pub fn complete(self) -> Result<T, Failure> {
        match self.value {
            Some(value) if self.details.is_empty() => Ok(value),
            _ => Err(Failure::invalid(self.details)),
        }
    }
}

/// Reads a value from JSON text.
///
/// # Errors
/// 400 when the text is no JSON.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Parsed<T>, Failure> {
    let mut json: Value = serde_json::from_slice(bytes).map_err(|error| {
        Failure::malformed(format!("the body is no JSON: {error}"))
            .suggest("send Content-Type: application/json")
    })?;
    if !json.is_object() {
        return Err(Failure::malformed("the body is no JSON object"));
    }
    let mut details: Vec<Detail> = Vec::new();
    while details.len() < DETAILS_MAX {
        let error = match serde_path_to_error::deserialize(&json) {
            Ok(value) => return Ok(Parsed { value: Some(value), details }),
            Err(error) => error,
        };
        let path = error.path().to_string();
        let found = explain(&path, &error.inner().to_string());
        // A field that was taken out because it was wrong and turns out to be required has been reported already.
        let known = details.iter().any(|d| d.field == found.field);
        let field = found.field.clone();
        if !known {
            details.push(found);
        }
        if known || !take_out(&mut json, &field) {
            break;
        }
    }
    Ok(Parsed { value: None, details })
}

/// serde's sentence about the value at `path`, as a detail.
fn explain(path: &str, text: &str) -> Detail {
    let path = if path == "." { "" } else { path };
    let inside = |name: &str| match path {
        "" => name.to_owned(),
        // The path of an unknown field already ends in its name.
        path if path == name || path.ends_with(&format!(".{name}")) => path.to_owned(),
        path => format!("{path}.{name}"),
    };
    let quoted = || text.split('`').nth(1).unwrap_or("");
    if text.starts_with("unknown field") {
        let possible = text.split_once("expected").map_or("", |(_, rest)| rest.trim_start_matches(" one of"));
        return detail(inside(quoted()), "unknown", format!("no such field; possible are{possible}"));
    }
    if text.starts_with("missing field") {
        return detail(inside(quoted()), "required", "is needed");
    }
    let field = if path.is_empty() { "body" } else { path };
    let range = RANGES.iter().find(|(name, _)| *name == field).map(|(_, range)| *range);
    let number = text.starts_with("invalid value: integer") || text.starts_with("invalid value: floating");
    let code = if number { "out_of_range" } else { "bad_format" };
    detail(field, code, range.map_or_else(|| text.to_owned(), |range| format!("{range} ({text})")))
}

/// Takes the value at a dotted path out of an object; answers whether it was there.
fn take_out(json: &mut Value, path: &str) -> bool {
    let mut at = json;
    let mut steps = path.split('.').peekable();
    while let Some(step) = steps.next() {
        // A wrong element takes its list along.
        let step = step.split('[').next().unwrap_or(step);
        let Some(object) = at.as_object_mut() else { return false };
        if steps.peek().is_none() {
            return object.remove(step).is_some();
        }
        let Some(next) = object.get_mut(step) else { return false };
        at = next;
    }
    false
}

/// True for answers to requests whose body may still be on its way.
pub fn closes(status: StatusCode) -> bool {
    status == StatusCode::PAYLOAD_TOO_LARGE || status == StatusCode::REQUEST_TIMEOUT
}

#[cfg(test)]
mod tests {
    use blixard_api::vm::CreateVm;

    use super::*;

    fn wrong(json: &str) -> Vec<(String, String)> {
        let parsed: Parsed<CreateVm> = parse(json.as_bytes()).unwrap();
        parsed.details.into_iter().map(|d| (d.field, d.code)).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    const ID: &str = "01KAJXG0RG000000000000001A";

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let json = format!(r#"{{"id":"{ID}","spec":{{"image":"a","cpus":2}}}}"#);
        assert_eq!(wrong(&json), pairs(&[("spec.cpus", "unknown")]));
        let json = format!(r#"{{"id":"{ID}","spec":{{"image":"a"}},"x":1}}"#);
        assert_eq!(wrong(&json), pairs(&[("x", "unknown")]));
    }

    #[test]
    fn all_wrong_fields_are_named_at_once() {
        let json =
            format!(r#"{{"id":"{ID}","spec":{{"image":"a","vcpus":10000,"memory_mib":"much","nope":1}}}}"#);
        let expected =
            [("spec.memory_mib", "bad_format"), ("spec.nope", "unknown"), ("spec.vcpus", "out_of_range")];
        let mut found = wrong(&json);
        found.sort();
        assert_eq!(found, pairs(&expected));
    }

    #[test]
    fn ten_thousand_vcpus_say_what_is_possible() {
        let json = format!(r#"{{"id":"{ID}","spec":{{"image":"a","vcpus":10000}}}}"#);
        let parsed: Parsed<CreateVm> = parse(json.as_bytes()).unwrap();
        assert!(parsed.details[0].message.contains("1 to 32"), "{:?}", parsed.details);
        assert!(parsed.value.is_some(), "the rest can still be looked at");
    }

    #[test]
    fn a_missing_field_and_a_bad_id_are_named() {
        assert_eq!(wrong(r#"{"id":"x","spec":{"image":"a"}}"#), pairs(&[("id", "bad_format")]));
        assert_eq!(wrong(&format!(r#"{{"id":"{ID}","spec":{{}}}}"#)), pairs(&[("spec.image", "required")]));
    }

    #[test]
    fn what_is_no_json_object_is_malformed() {
        for bytes in ["", "{", "[]", "7", "\u{0}"] {
            assert_eq!(parse::<CreateVm>(bytes.as_bytes()).err().unwrap().status, StatusCode::BAD_REQUEST);
        }
    }
}
