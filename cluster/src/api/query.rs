//! Query parameters: each is known and comes once, except labels.

use std::str::FromStr;

use axum::extract::Query;
use axum::http::Uri;

use super::error::Failure;

/// The parameters of one request.
#[derive(Debug)]
pub struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Reads the parameters, of which only these are possible.
    ///
    /// # Errors
    /// 422 for another one, 400 when they cannot be read.
    pub fn of(uri: &Uri, possible: &[&str]) -> Result<Self, Failure> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|error| Failure::malformed(format!("the query cannot be read: {error}")))?;
        for (name, _) in &pairs {
            if !possible.contains(&name.as_str()) {
                let text = match possible {
                    [] => "no parameter is possible here".to_owned(),
                    some => format!("no such parameter; possible are {}", some.join(", ")),
                };
                return Err(Failure::field(name.as_str(), "unknown", text));
            }
        }
        Ok(Self(pairs))
    }

    /// The value of a parameter that comes at most once.
    ///
    /// # Errors
    /// 422 when it comes more than once.
    pub fn text(&self, name: &str) -> Result<Option<&str>, Failure> {
        let mut values = self.all(name);
        match (values.next(), values.next()) {
            (_, Some(_)) => Err(Failure::field(name, "bad_format", "comes more than once")),
            (first, None) => Ok(first),
        }
    }

    /// The value of a parameter as another type.
    ///
    /// # Errors
    /// 422 when it is not of that type.
    pub fn value<T: FromStr>(&self, name: &str, form: &str) -> Result<Option<T>, Failure> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let wrong = |_| Failure::field(name, "bad_format", format!("{form} is needed"));
        text.parse().map(Some).map_err(wrong)
    }

    /// A number between these.
    ///
    /// # Errors
    /// 422 when it is something else.
    pub fn number(&self, name: &str, lowest: u64, highest: u64) -> Result<Option<u64>, Failure> {
        let form = format!("a number, {lowest} to {highest},");
        match self.value(name, &form)? {
            Some(n) if !(lowest..=highest).contains(&n) => {
                Err(Failure::field(name, "out_of_range", format!("{lowest} to {highest} are possible")))
            }
            number => Ok(number),
        }
    }

    /// `true` or `false`; absent is false.
    ///
    /// # Errors
    /// 422 when it is something else.
    pub fn flag(&self, name: &str) -> Result<bool, Failure> {
        Ok(self.value(name, "true or false")?.unwrap_or(false))
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let name = name.to_owned();
        self.0.iter().filter(move |(n, _)| *n == name).map(|(_, value)| value.as_str())
    }
}
