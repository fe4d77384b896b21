//! The one shape of every refusal: handlers return a [`Failure`], the outermost layer writes it out as
//! [`ApiError`] with the id of the request.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use blixard_agent_api::{AgentError, ProblemKind};
use blixard_api::{ApiError, Detail};

use crate::host::chain;
use crate::raft::ProposeError;
use crate::state::Refusal;

/// Why a request was refused.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Status of the answer.
    pub status: StatusCode,
    /// The body, still without the id of the request.
    pub body: Box<ApiError>,
}

impl Failure {
    fn new(status: StatusCode, error: &str, message: impl Into<String>) -> Self {
        let body = ApiError {
            error: error.into(),
            message: message.into(),
            details: Vec::new(),
            request_id: String::new(),
            suggestion: None,
            retryable: false,
        };
        Self { status, body: Box::new(body) }
    }

    /// What to try.
    #[must_use]
    pub fn suggest(mut self, suggestion: impl Into<String>) -> Self {
        self.body.suggestion = Some(suggestion.into());
        self
    }

    /// Trying the same again may help.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.body.retryable = true;
        self
    }

    /// 400: not what this API speaks.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", message)
    }

    /// 401: nobody knows who asks.
    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", message)
    }

    /// 403: not for this caller.
    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "denied", message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 405.
    pub fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    /// 408: not in the time given.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).retryable()
    }

    /// 409: what is there is in the way.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// 410: no longer remembered.
    pub fn compacted(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "compacted", message)
    }

    /// 412: it has changed since.
    pub fn generation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PRECONDITION_FAILED, "generation_mismatch", message)
    }

    /// 413.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// 422: fields are wrong, all of them at once.
    pub fn invalid(details: Vec<Detail>) -> Self {
        let message = match details.as_slice() {
            [only] => format!("{}: {}", only.field, only.message),
            more => {
                let fields: Vec<&str> = more.iter().map(|d| d.field.as_str()).collect();
                format!("{} fields are wrong: {}", more.len(), fields.join(", "))
            }
        };
        let mut failure = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "validation_error", message);
        failure.body.details = details;
        failure
    }

    /// 422 for one field.
    pub fn field(field: impl Into<String>, code: &str, message: impl Into<String>) -> Self {
        Self::invalid(vec![detail(field, code, message)])
    }

    /// 500: our fault; the cause is in the log.
    pub fn internal(message: impl Into<String>) -> Self {
        let message = message.into();
        tracing::error!("{message}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// 503: a part that is needed does not answer.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message).retryable()
    }

    /// 503: it may have been done, or may still be.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "outcome_unknown", message).retryable()
    }

    /// 507: there is not as much.
    pub fn no_capacity(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_capacity", message)
    }
}

/// What is wrong with one field.
pub fn detail(field: impl Into<String>, code: &str, message: impl Into<String>) -> Detail {
    Detail { field: field.into(), code: code.into(), message: message.into() }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<ProposeError> for Failure {
    fn from(error: ProposeError) -> Self {
        let text = error.to_string();
        match error {
            ProposeError::NotLeader { .. } => {
                Self::unavailable(text).suggest("try again; blixard cluster status shows who leads")
            }
            ProposeError::Unknown(_) | ProposeError::Discarded => {
                Self::unknown(text).suggest("try again: repeating the request does it once")
            }
            ProposeError::Level { .. } => Self::conflict(text)
                .suggest("install the new version on all nodes, then: blixard cluster raise-level"),
            ProposeError::Stopped(_) => {
                Self::unknown(text).suggest("look at the log of blixard-node; its disk may be full")
            }
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::NoVm => Self::not_found(text).suggest("blixard ps --all lists the VMs"),
            Refusal::NoImage(_) => Self::not_found(text)
                .suggest("blixard image ls lists the images, blixard image import FILE --name NAME adds one"),
            Refusal::NoKernel(_) => Self::not_found(text).suggest(
                "blixard kernel ls lists the kernels, sudo blixard kernel import adds the host's own",
            ),
            Refusal::NoNetwork(_) => Self::field("spec.network", "not_found", text),
            Refusal::NoNode(_) => Self::not_found(text).suggest("blixard node ls lists the nodes"),
            Refusal::NoToken => Self::denied(text).suggest("make a new one: blixard cluster token create"),
            Refusal::TokenExpired => {
                Self::denied(text).suggest("make a new one: blixard cluster token create")
            }
            Refusal::TooManyTokens(_) | Refusal::TooManyNodes(_) => Self::no_capacity(text),
            Refusal::NodeNameTaken(_) => Self::conflict(text).suggest("give the node another name: --name"),
            Refusal::LastNode => Self::conflict(text),
            Refusal::Level { .. } => Self::conflict(text).suggest("install a newer version on the node"),
            Refusal::NodeBehind { .. } => {
                Self::conflict(text).suggest("install the new version on all nodes first: blixard node ls")
            }
            Refusal::Changed(_) => Self::conflict(text).suggest("look at it and decide again"),
            Refusal::Initialised => Self::conflict(text),
            Refusal::NameTaken { name, .. } => {
                Self::conflict(text).suggest(format!("choose another name, or remove it: blixard rm {name}"))
            }
            Refusal::IdTaken(_) => Self::conflict(text).suggest("choose a new id for another VM"),
            Refusal::NetworkFull(_) | Refusal::TooMany(_) | Refusal::PlanFull => {
                Self::no_capacity(text).suggest("remove VMs that are no longer needed")
            }
            Refusal::Generation { .. } => {
                Self::generation(text).suggest("read the VM again and decide again")
            }
            Refusal::Runs(name) => {
                Self::conflict(text).suggest(format!("blixard stop {name}, or remove it by force"))
            }
            Refusal::Leaving(_) => Self::conflict(text).suggest("wait until it is gone"),
            Refusal::InUse { .. } => Self::conflict(text).suggest("remove these VMs first"),
            Refusal::NoRoom { .. } => Self::no_capacity(text)
                .suggest("remove or stop VMs, add a node, or see why: blixard run --dry-run --explain"),
            Refusal::Epoch { .. } | Refusal::NotReleased(_) | Refusal::NotSuspected(_) => {
                Self::conflict(text)
            }
            Refusal::TooManyDown { .. } => Self::conflict(text)
                .suggest("look at the network first; an operator may say so: blixard node down --force NODE"),
            Refusal::KeyReused => Self::conflict(text).suggest("use a new key for a new request"),
        }
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        match &error {
            AgentError::Refused(problem) => match problem.kind {
                ProblemKind::NotFound => Self::not_found(problem.message.clone()),
                ProblemKind::NotNow => {
                    Self::conflict(problem.message.clone()).suggest("wait until the VM is ready")
                }
                ProblemKind::Invalid | ProblemKind::Stale => Self::internal(chain(&error)),
                ProblemKind::Host => Self::unavailable(problem.message.clone()),
            },
            AgentError::Unreachable(_) => Self::unavailable(chain(&error))
                .suggest("is blixard-agent running? systemctl status blixard-agent"),
            AgentError::Confused => Self::internal(chain(&error)),
        }
    }
}
