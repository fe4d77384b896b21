//! Logs, exec and console of VMs on other nodes: any node takes the request, passes it on to the node that the VM is on, over a
//! connection between members, and its answer back, unread. A request is passed on once: a VM that has moved meanwhile is a
//! conflict, and trying again finds it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use blixard_api::REVISION_HEADER;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::sync::{Mutex, mpsc};

use super::error::Failure;
use super::serve::Accept;
use super::streams::{self, Kind};
use super::{Api, Shared, logs};
use crate::raft::peer::Stream;
use crate::state::{NodeId, NodeStatus, VmRecord};

/// Longest wait for the connection to another node.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the head of its answer.
const HEAD_MAX: Duration = Duration::from_secs(30);
/// Longest wait of the other node until it knows what the asking one knew.
const KNOW_MAX: Duration = Duration::from_secs(5);
/// Requests of other members that wait to be taken.
pub const WAITING_MAX: usize = 16;

/// Connections of other members with requests.
pub struct Members(Mutex<mpsc::Receiver<Box<dyn Stream>>>);

impl Members {
    /// Those that the server for members passes on.
    pub fn new(connections: mpsc::Receiver<Box<dyn Stream>>) -> Self {
        Self(Mutex::new(connections))
    }
}

impl Accept for Members {
    type Stream = Box<dyn Stream>;

    async fn next(&self) -> io::Result<Self::Stream> {
        match self.0.lock().await.recv().await {
            Some(stream) => Ok(stream),
            // The server for members has ended; so does whoever asks, by the same signal.
            None => std::future::pending().await,
        }
    }
}

/// What other members may ask for: nothing that replicated state is there for.
pub fn router(api: Shared) -> Router {
    Router::new()
        .route("/v1/projects/{project}/vms/{name}", get(asked).post(asked))
        .layer(from_fn_with_state(Arc::clone(&api), super::finish))
        .with_state(api)
}

async fn asked(
    State(api): State<Shared>,
    Path((project, name)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Failure> {
    api.know(request.headers()).await?;
    let (name, verb) = name.split_once(':').unwrap_or((&name, ""));
    let vm = api.find(&project, name)?;
    if vm.node != api.consensus.node() {
        return Err(Failure::conflict(format!("{name:?} is on another node by now"))
            .suggest("try again")
            .retryable());
    }
    match (request.method(), verb) {
        (&Method::GET, "logs") => logs::here(api, vm.id, request.uri()).await,
        (&Method::POST, "exec") => streams::here(api, vm.id, request, Kind::Exec).await,
        (&Method::POST, "console") => streams::here(api, vm.id, request, Kind::Console).await,
        (method, _) => Err(Failure::not_found(format!("members pass on no {method} {verb:?}"))),
    }
}

impl Api {
    /// Waits until the state has what the asking node knew.
    async fn know(&self, headers: &HeaderMap) -> Result<(), Failure> {
        let known = headers.get(REVISION_HEADER).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        let known = known.ok_or_else(|| Failure::malformed(format!("{REVISION_HEADER} is missing")))?;
        let mut revisions = self.consensus.replica().revisions();
        let reached = revisions.wait_for(|revision| *revision >= known);
        match tokio::time::timeout(KNOW_MAX, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Failure::timeout(format!("this node does not know revision {known} yet"))),
        }
    }

    /// The node that the VM is on, when it is another one.
    pub fn elsewhere(&self, vm: &VmRecord) -> Option<NodeId> {
        (vm.node != self.consensus.node()).then_some(vm.node)
    }

    /// Passes a request on to another node, and its answer back.
    ///
    /// # Errors
    /// 503 when the node cannot be reached or does not answer.
    pub async fn pass_on(&self, node: NodeId, request: Request) -> Result<Response, Failure> {
        let (name, down, revision) = {
            let state = self.consensus.replica().state();
            let record = state.node(node);
            let name = record.map_or_else(|| format!("number {node}"), |record| record.name.clone());
            let down = record.is_some_and(|record| record.offer.status == NodeStatus::Down);
            (name, down, state.revision())
        };
        let failed = |what: &str| {
            Failure::unavailable(format!("the VM is on node {name}, which {what}")).suggest("blixard node ls")
        };
        if down {
            return Err(failed("is down"));
        }
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let stream = tokio::time::timeout(CONNECT_MAX, self.consensus.requests_to(node)).await;
        let stream = stream.map_err(late).and_then(|stream| stream);
        let stream = stream.map_err(|error| failed(&format!("cannot be reached: {error}")))?;
        let broken = |error: hyper::Error| failed(&format!("does not answer: {error}"));
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // It ends with the answer, or with the stream that the answer becomes.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(node, "a request that was passed on ended: {error}");
            }
        });
        let (mut outer, inner) = split(request, revision);
        let answer = tokio::time::timeout(HEAD_MAX, sender.send_request(inner)).await;
        let mut answer = answer.map_err(|_| failed("does not answer"))?.map_err(broken)?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let there = hyper::upgrade::on(&mut answer);
            return Ok(streams::upgraded(&mut outer, self.stop.clone(), async move {
                there.await.map(TokioIo::new).map_err(io::Error::other)
            }));
        }
        let mut response = answer.map(Body::new).into_response();
        // The connection behind it is another one (RFC 9110, section 7.6.1).
        for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
            response.headers_mut().remove(name);
        }
        Ok(response)
    }
}

/// A request as it came, and as it is passed on: without a body, with what this node knows.
fn split(request: Request, revision: u64) -> (Request, Request<Body>) {
    let mut inner = Request::new(Body::empty());
    *inner.method_mut() = request.method().clone();
    *inner.uri_mut() = request.uri().clone();
    let headers = inner.headers_mut();
    for name in [header::CONNECTION, header::UPGRADE] {
        if let Some(value) = request.headers().get(&name) {
            headers.insert(name, value.clone());
        }
    }
    // RFC 9112, section 3.2: every request has one.
    headers.insert(header::HOST, HeaderValue::from_static("blixard"));
    headers.insert(HeaderName::from_static(REVISION_HEADER), revision.into());
    (request, inner)
}
