//! What a command ends with when it does not succeed: a text for people or JSON for programs, and an exit code.

use std::io;

use blixard_api::client::ClientError;
use blixard_api::{ApiError, Detail};
use blixard_images::kernel::CollectError;

/// Exit codes (the ones of exec and run besides).
pub mod code {
    /// Anything without a code of its own.
    pub const ERROR: u8 = 1;
    /// What was asked for is not possible like this.
    pub const USAGE: u8 = 2;
    /// There is no such thing.
    pub const NOT_FOUND: u8 = 3;
    /// It is not in the state for this.
    pub const CONFLICT: u8 = 4;
    /// No node has room.
    pub const NO_CAPACITY: u8 = 5;
    /// The time was over.
    pub const TIMEOUT: u8 = 6;
    /// Not permitted.
    pub const DENIED: u8 = 7;
    /// A failure of exec or run themselves, not of the command.
    pub const OWN: u8 = 125;
    /// Ctrl-C.
    pub const INTERRUPTED: u8 = 130;
}

/// A command that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The node could not be asked, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What was asked for is not possible like this.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to try.
        suggestion: String,
    },
    /// Something on this host does not work.
    #[error("{what}")]
    Local {
        /// What did not work.
        what: String,
        /// The system's answer.
        source: io::Error,
        /// What to try.
        suggestion: Option<String>,
    },
    /// A VM did not become what was asked for.
    #[error("{message}")]
    Vm {
        /// What happened and why.
        message: String,
        /// What to try.
        suggestion: String,
        /// Exit code.
        code: u8,
    },
    /// A value that the API has no form for.
    #[error("{message}")]
    Value {
        /// What is wrong.
        message: String,
        /// The field of the API.
        field: &'static str,
        /// What is possible.
        possible: String,
    },
    /// A guest kernel cannot be collected.
    #[error("cannot collect the kernel")]
    Kernel(#[from] CollectError),
    /// The output cannot be written.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    /// A failure of exec or run themselves, not of the command in the VM.
    #[error(transparent)]
    Own(Box<CliError>),
}

impl CliError {
    /// Something on this host that does not work.
    pub fn local(what: impl Into<String>, source: io::Error) -> Self {
        Self::Local { what: what.into(), source, suggestion: None }
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Client(error) => client_code(error),
            Self::Usage { .. } => code::USAGE,
            Self::Local { source, .. } => io_code(source),
            Self::Vm { code, .. } => *code,
            Self::Kernel(CollectError::Read { source, .. }) => io_code(source),
            Self::Value { .. } | Self::Kernel(_) | Self::Output(_) => code::ERROR,
            Self::Own(_) => code::OWN,
        }
    }

    /// What to try.
    pub fn suggestion(&self) -> Option<String> {
        match self {
            Self::Client(error) => error.suggestion(),
            Self::Usage { suggestion, .. } | Self::Vm { suggestion, .. } => Some(suggestion.clone()),
            Self::Local { suggestion, .. } => suggestion.clone(),
            Self::Kernel(_) => {
                Some("name one with `blixard kernel import --kernel FILE --modules DIR`".into())
            }
            Self::Value { .. } | Self::Output(_) => None,
            Self::Own(error) => error.suggestion(),
        }
    }

    /// The reader of the output has gone; that is no error to tell of.
    pub fn is_closed_output(&self) -> bool {
        match self {
            Self::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
            Self::Own(error) => error.is_closed_output(),
            _ => false,
        }
    }

    /// The same as the one shape of every refusal.
    pub fn to_api(&self) -> ApiError {
        let inner = match self {
            Self::Own(error) => return error.to_api(),
            Self::Client(ClientError::Refused(refusal)) => return refusal.error.clone(),
            other => other,
        };
        let kind = match inner.code() {
            _ if matches!(inner, Self::Value { .. }) => "validation_error",
            code::USAGE => "usage",
            code::NOT_FOUND => "not_found",
            code::CONFLICT => "conflict",
            code::TIMEOUT => "timeout",
            code::DENIED => "denied",
            _ if matches!(inner, Self::Client(e) if e.retryable()) => "unavailable",
            _ => "error",
        };
        ApiError {
            error: kind.into(),
            message: chain(inner),
            details: match inner {
                Self::Value { field, possible, .. } => vec![Detail {
                    field: (*field).into(),
                    code: "out_of_range".into(),
                    message: possible.clone(),
                }],
                _ => vec![],
            },
            request_id: String::new(),
            suggestion: inner.suggestion(),
            retryable: matches!(inner, Self::Client(e) if e.retryable()),
        }
    }

    /// For people: what happened, why, what to try.
    pub fn to_text(&self) -> String {
        let api = self.to_api();
        let mut text = format!("Error: {}", api.message);
        if !api.request_id.is_empty() {
            text.push_str(&format!(" ({}, request {})", api.error, api.request_id));
        }
        for Detail { field, message, .. } in &api.details {
            // The message of a single wrong field is often the field's.
            let line = format!("{field}: {message}");
            if !api.message.contains(&line) {
                text.push_str(&format!("\n  {line}"));
            }
        }
        if let Some(suggestion) = &api.suggestion {
            text.push_str(&format!("\nTry: {suggestion}"));
        }
        text
    }

    /// For programs: the refusal with the exit code.
    pub fn to_json(&self) -> String {
        let mut value = serde_json::to_value(self.to_api()).unwrap_or_default();
        if let Some(map) = value.as_object_mut() {
            map.insert("exit_code".into(), self.code().into());
        }
        value.to_string()
    }
}

/// The text of an error and of everything behind it.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(&format!(": {cause_text}"));
        }
        next = cause.source();
    }
    text
}

fn io_code(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::NotFound => code::NOT_FOUND,
        io::ErrorKind::PermissionDenied => code::DENIED,
        io::ErrorKind::TimedOut => code::TIMEOUT,
        _ => code::ERROR,
    }
}

fn client_code(error: &ClientError) -> u8 {
    let refusal = match error {
        ClientError::Refused(refusal) => refusal,
        ClientError::NotAHost(_) => return code::USAGE,
        ClientError::NoAnswer { .. } => return code::TIMEOUT,
        ClientError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            return code::DENIED;
        }
        _ => return code::ERROR,
    };
    match refusal.status {
        404 => code::NOT_FOUND,
        409 | 412 => code::CONFLICT,
        507 => code::NO_CAPACITY,
        408 => code::TIMEOUT,
        401 | 403 => code::DENIED,
        400 | 422 if all_missing(&refusal.error.details) => code::NOT_FOUND,
        _ => code::ERROR,
    }
}

/// What was named is not there, and nothing else is wrong.
fn all_missing(details: &[Detail]) -> bool {
    !details.is_empty() && details.iter().all(|d| d.code == "not_found")
}

#[cfg(test)]
mod tests {
    use blixard_api::client::Refusal;

    use super::*;

    fn refused(status: u16, detail: Option<&str>) -> CliError {
        let details = detail.map(|code| Detail {
            field: "spec.image".into(),
            code: code.into(),
            message: "there is none".into(),
        });
        let error = ApiError {
            error: "validation_error".into(),
            message: "the VM cannot be made".into(),
            details: details.into_iter().collect(),
            request_id: "r1".into(),
            suggestion: Some("blixard image ls".into()),
            retryable: false,
        };
        CliError::Client(ClientError::Refused(Box::new(Refusal { status, error })))
    }

    #[test]
    fn each_status_has_the_exit_code_of_the_documentation() {
        for (status, code) in [
            (404, 3),
            (409, 4),
            (412, 4),
            (507, 5),
            (408, 6),
            (401, 7),
            (403, 7),
            (422, 1),
            (400, 1),
            (500, 1),
            (503, 1),
            (413, 1),
        ] {
            assert_eq!(refused(status, None).code(), code, "{status}");
        }
        assert_eq!(refused(422, Some("not_found")).code(), 3);
        assert_eq!(CliError::Own(Box::new(refused(404, None))).code(), 125);
    }

    #[test]
    fn an_error_says_what_happened_where_and_what_to_try() {
        let text = refused(422, Some("not_found")).to_text();
        assert_eq!(
            text,
            "Error: the VM cannot be made (validation_error, request r1)\n  spec.image: there is none\nTry: blixard image ls"
        );
        let json: serde_json::Value = serde_json::from_str(&refused(409, None).to_json()).unwrap();
        assert_eq!(
            (json["exit_code"].as_u64(), json["suggestion"].as_str()),
            (Some(4), Some("blixard image ls"))
        );
    }

    #[test]
    fn a_cause_is_told_once() {
        let host = "/nowhere.sock".parse().unwrap();
        let source = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = CliError::Client(ClientError::Connect { host, source });
        assert_eq!(error.code(), 7);
        let text = error.to_text();
        assert!(text.contains("/nowhere.sock: permission denied"), "{text}");
        assert!(text.contains("Try: your user may not use the socket"), "{text}");
    }
}
