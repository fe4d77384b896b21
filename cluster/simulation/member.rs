//! A node that runs, as clients and operators reach it: its API, asked in HTTP, but without a connection.

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, StatusCode, header};
use blixard_api::IDEMPOTENCY_HEADER;
use blixard_node::raft::Consensus;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::trace::Trace;

/// A node that runs.
#[derive(Clone)]
pub struct Member {
    /// Its part in the cluster.
    pub consensus: Consensus,
    /// Cancelled when it ends.
    pub alive: CancellationToken,
    /// Its API.
    pub api: Router,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Its method.
    pub method: Method,
    /// What it is about, with its query.
    pub path: String,
    /// Its body.
    pub body: Option<Value>,
    /// Its idempotency key.
    pub key: Option<String>,
    /// The generation that the VM shall have.
    pub if_generation: Option<u64>,
}

/// What became of a request.
#[derive(Debug)]
pub enum Became {
    /// It was answered.
    Answered(StatusCode, Value),
    /// Nothing was done.
    Not,
    /// Nobody knows.
    Unknown,
}

impl Ask {
    /// A request without anything else.
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), body: None, key: None, if_generation: None }
    }

    /// A read of all that was acknowledged before.
    pub fn read(path: &str) -> Self {
        Self::new(Method::GET, format!("{path}?linearizable=true"))
    }

    /// With a body.
    pub fn with(mut self, body: Value) -> Self {
        self.body = Some(body);
        self
    }
}

impl Became {
    /// The body of a success.
    pub fn body<T: DeserializeOwned>(&self, trace: &Trace) -> Option<T> {
        let Self::Answered(status, body) = self else { return None };
        if !status.is_success() {
            return None;
        }
        let read = T::deserialize(body);
        read.inspect_err(|error| trace.wrong(format_args!("an answer cannot be read: {error}: {body}"))).ok()
    }
}

impl Member {
    /// Asks its API. An answer that must not be is noted as wrong.
    pub async fn ask(&self, ask: Ask, trace: &Trace) -> Became {
        let about = format!("{} {}", ask.method, ask.path);
        // A node that ends while it is asked does not answer.
        let answered = self.alive.run_until_cancelled(self.answer(ask)).await;
        let Some((status, body)) = answered.filter(|_| !self.alive.is_cancelled()) else {
            return Became::Unknown;
        };
        let code = body.get("error").and_then(Value::as_str).unwrap_or_default();
        match (status, code) {
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable") => Became::Not,
            (StatusCode::SERVICE_UNAVAILABLE, "outcome_unknown") => Became::Unknown,
            (
                StatusCode::NOT_FOUND
                | StatusCode::CONFLICT
                | StatusCode::PRECONDITION_FAILED
                | StatusCode::UNPROCESSABLE_ENTITY
                | StatusCode::INSUFFICIENT_STORAGE,
                _,
            ) => Became::Answered(status, body),
            _ if status.is_success() => Became::Answered(status, body),
            _ => {
                trace.wrong(format_args!("{about} is answered with {status}: {body}"));
                Became::Unknown
            }
        }
    }

    async fn answer(&self, ask: Ask) -> (StatusCode, Value) {
        let Ask { method, path, body, key, if_generation } = ask;
        let mut request = axum::http::Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header(IDEMPOTENCY_HEADER, key);
        }
        if let Some(generation) = if_generation {
            request = request.header(header::IF_MATCH, generation);
        }
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let wrong = |error: &dyn std::fmt::Display| {
            (StatusCode::INTERNAL_SERVER_ERROR, Value::String(error.to_string()))
        };
        let request = match request.body(body) {
            Ok(request) => request,
            Err(error) => return wrong(&error),
        };
        let Ok(response) = TowerToHyperService::new(self.api.clone()).call(request).await;
        let (head, body) = response.into_parts();
        let read = to_bytes(body, usize::MAX).await.map_err(|error| wrong(&error));
        match read.map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(body)) => (head.status, body),
            Ok(Err(error)) => wrong(&error),
            Err(failed) => failed,
        }
    }
}
