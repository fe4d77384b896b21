//! The REST API: routes, limits, and what every answer carries.
//!
//! * [`serve`]: sockets and connections
//! * [`body`], [`query`], [`error`], [`mutate`]: what requests share
//! * [`vms`], [`validate`], [`view`], [`wait`]: VMs
//! * [`placement`]: where VMs go, and what operators say about nodes
//! * [`streams`], [`logs`], [`watch`]: what goes on longer than a request
//! * [`members`]: requests that another node has the answer to
//! * [`content`]: images and kernels
//! * [`cluster`], [`nodes`]: the cluster itself
//! * [`port`]: TLS for other nodes and users
//! * [`server`]: version, health, doctor, metrics

pub mod body;
pub mod cluster;
pub mod content;
pub mod error;
pub mod logs;
pub mod members;
pub mod mutate;
pub mod nodes;
pub mod placement;
pub mod port;
pub mod query;
pub mod serve;
pub mod server;
pub mod streams;
pub mod validate;
pub mod view;
pub mod vms;
pub mod wait;
pub mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use blixard_api::{ApiError, REVISION_HEADER};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use self::error::Failure;
use crate::auth::tls::Tls;
use crate::host::Agent;
use crate::host::local::Local;
use crate::images::Importer;
use crate::metrics::Metrics;
use crate::node::Restart;
use crate::raft::Consensus;

/// Longest time that a JSON body takes to arrive, and an upload to go on.
pub const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// Header of each answer: the id of the request, also in the node's log.
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("blixard-request-id");

/// What requests are answered from.
pub struct Api {
    /// The replicated state.
    pub consensus: Consensus,
    /// What this node knows besides.
    pub local: Arc<Local>,
    /// The agent.
    pub agent: Arc<dyn Agent>,
    /// Images and kernels.
    pub importer: Importer,
    /// Held while the host's own kernel is imported.
    pub default_kernel: tokio::sync::Mutex<()>,
    /// Numbers for Prometheus.
    pub metrics: Metrics,
    /// Name of this node.
    pub node_name: String,
    /// The keys in use, when other nodes can reach this one.
    pub tls: Option<Tls>,
    /// The state folder.
    pub folder: PathBuf,
    /// Where this node stands.
    pub labels: BTreeMap<String, String>,
    /// Tells the node to start its parts anew.
    pub restart: tokio::sync::watch::Sender<Option<Restart>>,
    /// Ends long answers when the node stops.
    pub stop: CancellationToken,
}

/// All of it, shared by all requests.
pub type Shared = Arc<Api>;

/// The routes.
pub fn router(api: Shared) -> Router {
    Router::new()
        .route("/v1/version", get(server::version))
        .route("/v1/health", get(server::health))
        .route("/v1/doctor", get(server::doctor))
        .route("/v1/watch", get(watch::watch))
        .route("/v1/projects/{project}/vms", get(vms::list).post(vms::create))
        .route("/v1/projects/{project}/vms/{name}", get(vms::get).post(vms::act).delete(vms::delete))
        .route("/v1/images", get(content::list_images).post(content::upload_image))
        .route("/v1/images/{*name}", get(content::get_image).delete(content::delete_image))
        .route("/v1/kernels", get(content::list_kernels).post(content::upload_kernel))
        .route("/v1/kernels/{name}", get(content::get_kernel).delete(content::delete_kernel))
        .route("/v1/cluster", get(cluster::status))
        .route("/v1/cluster:{verb}", post(cluster::act))
        .route("/v1/node:{verb}", post(cluster::act_on_this))
        .route("/v1/nodes", get(nodes::list))
        .route("/v1/nodes/{name}", get(nodes::get).post(nodes::act).delete(nodes::delete))
        .route("/v1/join-tokens", get(nodes::list_join_tokens).post(nodes::create_join_token))
        .route("/v1/join-tokens/{name}", delete(nodes::delete_join_token))
        .route("/v1/tokens", get(nodes::list_api_tokens).post(nodes::create_api_token))
        .route("/v1/tokens/{name}", delete(nodes::delete_api_token))
        .route("/v1/nodes/{name}/policy", get(placement::policy).put(placement::set_policy))
        .route("/metrics", get(server::metrics))
        .method_not_allowed_fallback(wrong_method)
        .fallback(wrong_path)
        .layer(from_fn_with_state(Arc::clone(&api), finish))
        .with_state(api)
}

async fn wrong_path(request: Request) -> Failure {
    Failure::not_found(format!("there is nothing at {}", request.uri().path()))
        .suggest("the paths are listed in the API reference; they begin with /v1/")
}

async fn wrong_method(request: Request) -> Failure {
    Failure::method_not_allowed(format!("{} is not possible at {}", request.method(), request.uri().path()))
}

/// The outermost layer: gives the request its id, writes out failures, and adds what every answer carries.
async fn finish(
    State(api): State<Shared>,
    matched: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let begin = Instant::now();
    let id = request_id();
    let route = matched.map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    if let Some(failure) = response.extensions_mut().remove::<Failure>() {
        let Failure { status, body } = failure;
        tracing::debug!(request_id = %id, %method, path, %status, "{}", body.message);
        let headers = std::mem::take(response.headers_mut());
        response = json(status, &ApiError { request_id: id.clone(), ..*body });
        // The list of possible methods of a 405.
        response.headers_mut().extend(headers.into_iter().filter(|(name, _)| *name == Some(header::ALLOW)));
        if body::closes(status) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
    let revision = HeaderName::from_static(REVISION_HEADER);
    if !response.headers().contains_key(&revision) {
        let now = *api.consensus.replica().revisions().borrow();
        response.headers_mut().insert(revision, now.into());
    }
    // What another node has answered has its id, there as in the body.
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().entry(REQUEST_ID_HEADER).or_insert(value);
    }
    api.metrics.request(method.as_str(), &route, response.status().as_u16(), begin.elapsed());
    response
}

/// A refusal before the routes are reached, written out.
fn refused(failure: Failure) -> Response {
    let Failure { status, body } = failure;
    json(status, &ApiError { request_id: request_id(), ..*body })
}

/// A ULID. Unpredictability is not needed, uniqueness is: the random part is a keyed hash of a counter.
fn request_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let random = (u128::from(number & 0xffff) << 64) | u128::from(KEY.hash_one(number));
    Ulid::from_parts(crate::clock::now_ms(), random).to_string()
}

/// An answer with a JSON body.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => Failure::internal(format!("the answer cannot be written: {error}")).into_response(),
    }
}

/// An answer that was read from, or made, this revision of the state.
fn answer(status: StatusCode, revision: u64, value: &impl Serialize) -> Response {
    let mut response = json(status, value);
    response.headers_mut().insert(HeaderName::from_static(REVISION_HEADER), revision.into());
    response
}
