//! One HTTP/1.1 request on one connection: sending, refusals, bounded answers, upgrades.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;

use super::error::{ClientError, Refusal};
use super::host::Host;
use super::upload::{RequestBody, Upload};
use crate::{ApiError, BODY_BYTES_MAX, IDEMPOTENCY_HEADER, UPGRADE};

/// Longest JSON answer in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Longest body of a refusal in bytes.
const REFUSAL_BYTES_MAX: usize = 1 << 20;
/// Longest time that an ordinary request takes.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(60);

/// A stream of bytes both ways, after an upgrade.
pub type Stream = TokioIo<hyper::upgrade::Upgraded>;

/// A request before it is sent. Sending it again is possible unless it has an upload.
pub(super) struct Call {
    pub method: Method,
    pub path: String,
    pub json: Option<Bytes>,
    pub upload: Option<Box<Upload>>,
    pub idempotency: Option<String>,
    pub upgrade: bool,
    /// An answer with status 503 is as good as others: its body says more.
    pub or_503: bool,
    /// Longest time until the head of the answer; `None`: as long as it takes.
    pub time: Option<Duration>,
}

impl Call {
    pub fn new(method: Method, path: String) -> Self {
        Self {
            method,
            path,
            json: None,
            upload: None,
            idempotency: None,
            upgrade: false,
            or_503: false,
            time: Some(ANSWER_TIME),
        }
    }

    pub fn json(mut self, body: &impl serde::Serialize) -> Result<Self, ClientError> {
        let bytes = serde_json::to_vec(body).map_err(|e| ClientError::BadRequest(e.to_string()))?;
        if bytes.len() > BODY_BYTES_MAX {
            let why = format!("its body has {} bytes, {BODY_BYTES_MAX} are possible", bytes.len());
            return Err(ClientError::BadRequest(why));
        }
        self.json = Some(bytes.into());
        Ok(self)
    }

    fn request(&mut self, host: &Host) -> Result<Request<RequestBody>, ClientError> {
        let mut builder = Request::builder()
            .method(self.method.clone())
            .uri(&self.path)
            .header(header::HOST, host.authority())
            .header(header::USER_AGENT, concat!("blixard/", env!("CARGO_PKG_VERSION")));
        if let Some(secret) = host.bearer() {
            builder = builder.header(header::AUTHORIZATION, format!("Bearer {secret}"));
        }
        if let Some(key) = &self.idempotency {
            builder = builder.header(HeaderName::from_static(IDEMPOTENCY_HEADER), key);
        }
        if self.upgrade {
            builder = builder
                .header(header::CONNECTION, HeaderValue::from_static("upgrade"))
                .header(header::UPGRADE, HeaderValue::from_static(UPGRADE));
        }
        let body = match self.upload.take() {
            Some(upload) => {
                builder = builder.header(header::CONTENT_TYPE, "application/octet-stream");
                RequestBody::Upload(upload)
            }
            None => {
                if self.json.is_some() {
                    builder = builder.header(header::CONTENT_TYPE, "application/json");
                }
                RequestBody::Full(self.json.clone())
            }
        };
        builder.body(body).map_err(|e| ClientError::BadRequest(e.to_string()))
    }
}

/// Sends the call on a connection of its own and returns the head of a good answer; its body follows.
pub(super) async fn send(host: &Host, call: &mut Call) -> Result<Response<Incoming>, ClientError> {
    let request = call.request(host)?;
    let broken = |source| ClientError::Broken { host: host.clone(), source };
    let exchange = async {
        let stream =
            host.connect().await.map_err(|source| ClientError::Connect { host: host.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(broken)
    };
    let response = match call.time {
        Some(time) => tokio::time::timeout(time, exchange)
            .await
            .map_err(|_| ClientError::NoAnswer { host: host.clone(), time })??,
        None => exchange.await?,
    };
    let status = response.status();
    if status.is_success()
        || (call.upgrade && status == StatusCode::SWITCHING_PROTOCOLS)
        || (call.or_503 && status == StatusCode::SERVICE_UNAVAILABLE)
    {
        return Ok(response);
    }
    Err(refusal(host, response).await)
}

/// The stream behind a good answer to a call with `upgrade`.
pub(super) async fn upgraded(host: &Host, response: Response<Incoming>) -> Result<Stream, ClientError> {
    let answered = response.headers().get(header::UPGRADE).is_some_and(|v| v == UPGRADE);
    if response.status() != StatusCode::SWITCHING_PROTOCOLS || !answered {
        let what = format!("status {} instead of a stream", response.status());
        return Err(ClientError::Foreign { host: host.clone(), what });
    }
    let stream = hyper::upgrade::on(response).await;
    stream.map(TokioIo::new).map_err(|source| ClientError::Broken { host: host.clone(), source })
}

/// The whole body of a good answer as JSON.
pub(super) async fn json<T: DeserializeOwned>(
    host: &Host,
    response: Response<Incoming>,
) -> Result<T, ClientError> {
    let bytes = collect(host, response.into_body(), ANSWER_BYTES_MAX).await?;
    serde_json::from_slice(&bytes).map_err(|source| ClientError::Unreadable { host: host.clone(), source })
}

async fn collect(host: &Host, mut body: Incoming, limit: usize) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::with_capacity(usize::try_from(body.size_hint().lower()).unwrap_or(0).min(limit));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| ClientError::Broken { host: host.clone(), source })?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(ClientError::TooLong { host: host.clone(), limit });
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

async fn refusal(host: &Host, response: Response<Incoming>) -> ClientError {
    let status = response.status();
    let bytes = match collect(host, response.into_body(), REFUSAL_BYTES_MAX).await {
        Ok(bytes) => bytes,
        Err(error) => return error,
    };
    match serde_json::from_slice::<ApiError>(&bytes) {
        Ok(error) => ClientError::Refused(Box::new(Refusal { status: status.as_u16(), error })),
        Err(_) => {
            let text: String = String::from_utf8_lossy(&bytes).chars().take(200).collect();
            let colon = if text.is_empty() { "" } else { ": " };
            ClientError::Foreign { host: host.clone(), what: format!("status {status}{colon}{text}") }
        }
    }
}
