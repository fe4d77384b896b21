//! The one shape of every refusal.

use serde::{Deserialize, Serialize};

/// Body of every answer with a status of 400 or more.
///
/// | status | `error` |
/// |---|---|
/// | 400 | `malformed_request` |
/// | 401, 403 | `unauthenticated`, `denied` |
/// | 404 | `not_found` |
/// | 405 | `method_not_allowed` |
/// | 408 | `timeout` |
/// | 409 | `conflict` (a name twice, a VM that runs) |
/// | 410 | `compacted` |
/// | 412 | `generation_mismatch` |
/// | 413 | `too_large` |
/// | 422 | `validation_error` |
/// | 429 | `too_many_requests` |
/// | 500 | `internal` |
/// | 503 | `unavailable` (no leader, no agent): nothing was done |
/// | 503 | `outcome_unknown`: it may have been done; with an idempotency key, asking again does it once |
/// | 507 | `no_capacity` |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Kind, for programs.
    pub error: String,
    /// What happened and why, one sentence.
    pub message: String,
    /// Per field, when fields are wrong.
    #[serde(default)]
    pub details: Vec<Detail>,
    /// Identity of the request, also in the node's log.
    #[serde(default)]
    pub request_id: String,
    /// What to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<String>,
    /// Trying the same again may help.
    #[serde(default)]
    pub retryable: bool,
}

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detail {
    /// Path of the field, for example `spec.vcpus`.
    pub field: String,
    /// Kind, for programs: `required`, `out_of_range`, `unknown`, `bad_format`, `not_found`.
    pub code: String,
    /// What is wrong and what is possible.
    pub message: String,
}
