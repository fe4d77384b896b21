//! Nodes: list, read, cordon, remove; and tokens.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use blixard_api::cluster::{CreateToken, NodeRole, NodeRoom, NodeState, NodeView, TokenView};
use blixard_api::token::{Access, ApiToken, JoinToken};
use blixard_api::{Page, check_name};

use super::error::Failure;
use super::query::Parameters;
use super::{Api, Shared, answer, body};
use crate::auth::{random_hex, sha256_hex};
use crate::host::chain;
use crate::scheduler::Size;
use crate::state::{
    Answer, ApiTokenRecord, Command, JoinTokenRecord, MemberCommand, NodeId, NodeRecord, NodeStatus,
    State as ClusterState,
};

/// How long a join token is valid when nothing is said, and at most, in milliseconds.
const JOIN_TTL_MS: u64 = 60 * 60 * 1000;
const JOIN_TTL_MS_MAX: u64 = 7 * 24 * 60 * 60 * 1000;
/// How much of a join token's digest names it.
const DIGEST_NAME: usize = 12;
/// Most addresses in a join token.
const ADDRESSES_MAX: usize = 8;

/// There is no such node.
pub fn no_node(name: &str) -> Failure {
    Failure::not_found(format!("there is no node {name:?}")).suggest("blixard node ls lists the nodes")
}

/// `GET /v1/nodes`
pub async fn list(State(api): State<Shared>, uri: Uri) -> Result<Response, Failure> {
    api.at_least(&Parameters::of(&uri, &["linearizable", "min_revision", "timeout_ms"])?).await?;
    let state = api.consensus.replica().state();
    let items = state.nodes().map(|node| api.node_view(&state, node)).collect();
    let page = Page { items, cursor: None, revision: state.revision() };
    Ok(answer(StatusCode::OK, page.revision, &page))
}

/// `GET /v1/nodes/{name}`
pub async fn get(State(api): State<Shared>, Path(name): Path<String>, uri: Uri) -> Result<Response, Failure> {
    api.at_least(&Parameters::of(&uri, &["linearizable", "min_revision", "timeout_ms"])?).await?;
    let state = api.consensus.replica().state();
    let node = state.node_named(&name).ok_or_else(|| no_node(&name))?;
    Ok(answer(StatusCode::OK, state.revision(), &api.node_view(&state, node)))
}

/// `POST /v1/nodes/{name}:{verb}`
pub async fn act(
    State(api): State<Shared>,
    Path(word): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    let (parts, content) = request.into_parts();
    Parameters::of(&parts.uri, &[])?;
    let bytes = body::read(&parts.headers, content).await?;
    let (name, verb) = word.split_once(':').unwrap_or((word.as_str(), ""));
    let cordoned = match verb {
        "cordon" => true,
        "uncordon" => false,
        other => return super::placement::operate(&api, name, other, &parts, &bytes).await,
    };
    let node = api.node_id(name).await?;
    api.change_node(MemberCommand::Cordon { node, cordoned }).await
}

/// `DELETE /v1/nodes/{name}`
pub async fn delete(
    State(api): State<Shared>,
    Path(name): Path<String>,
    uri: Uri,
) -> Result<Response, Failure> {
    Parameters::of(&uri, &[])?;
    let node = api.node_id(&name).await?;
    api.change_node(MemberCommand::Remove { node }).await
}

impl Api {
    /// The number of the node with this name, which this node may not know yet.
    pub(super) async fn node_id(&self, name: &str) -> Result<NodeId, Failure> {
        let known = || self.consensus.replica().state().node_named(name).map(|node| node.id);
        if let Some(node) = known() {
            return Ok(node);
        }
        self.catch_up().await?;
        known().ok_or_else(|| no_node(name))
    }

    async fn change_node(&self, command: MemberCommand) -> Result<Response, Failure> {
        let (revision, done) = self.propose(None, Command::Member(Box::new(command))).await?;
        let Answer::Node(node) = done else {
            return Err(Failure::internal("the state answered with something else than a node"));
        };
        let state = self.consensus.replica().state();
        Ok(answer(StatusCode::OK, revision, &self.node_view(&state, &node)))
    }

    pub(super) fn node_view(&self, state: &ClusterState, node: &NodeRecord) -> NodeView {
        let (voters, heard) = self.consensus.standing();
        let seen = state.view().node(node.id);
        NodeView {
            name: node.name.clone(),
            id: node.id,
            role: if self.consensus.leader_id() == Some(node.id) {
                NodeRole::Leader
            } else if voters.contains(&node.id) {
                NodeRole::Voter
            } else {
                NodeRole::Learner
            },
            address: node.address,
            labels: node.labels.clone(),
            cordoned: node.cordoned,
            draining: node.offer.drain_grace_ms.is_some(),
            leased: node.offer.leased,
            status: match node.offer.status {
                NodeStatus::Up => NodeState::Up,
                NodeStatus::Suspected => NodeState::Suspected,
                NodeStatus::Down => NodeState::Down,
            },
            version: node.version.clone(),
            feature_level: node.feature_level,
            vms: state.vms().filter(|vm| vm.node == node.id).count(),
            used: seen.map(|seen| room(seen.used)).unwrap_or_default(),
            room: seen.and_then(|seen| seen.info.room).map(room),
            heard_ms_ago: heard.get(&node.id).copied(),
        }
    }

    /// What a new token says about the cluster: by what all know, since one that names an authority of before would be refused.
    async fn access(&self, secret: String) -> Result<Access, Failure> {
        self.catch_up().await?;
        let state = self.consensus.replica().state();
        let trust = state.trust().ok_or_else(|| {
            Failure::conflict("no other host can reach this node yet")
                .suggest("blixard cluster init --address ADDRESS:PORT")
        })?;
        let signer = trust.signer().ok_or_else(|| Failure::internal("no authority signs"))?;
        Ok(Access { cluster: trust.cluster.clone(), authority_sha256: signer.sha256.clone(), secret })
    }
}

fn room(size: Size) -> NodeRoom {
    NodeRoom { cpu_milli: size.cpu_milli, memory_mib: size.memory_mib, disk_mib: size.disk_mib }
}

async fn wanted(request: Request) -> Result<CreateToken, Failure> {
    let (parts, content) = request.into_parts();
    Parameters::of(&parts.uri, &[])?;
    let bytes = body::read(&parts.headers, content).await?;
    if bytes.is_empty() {
        return Ok(CreateToken::default());
    }
    body::parse(&bytes)?.complete()
}

/// `POST /v1/join-tokens`
pub async fn create_join_token(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let wanted = wanted(request).await?;
    let ttl = wanted.ttl_ms.unwrap_or(JOIN_TTL_MS);
    if !(1000..=JOIN_TTL_MS_MAX).contains(&ttl) {
        return Err(Failure::field(
            "ttl_ms",
            "out_of_range",
            format!("1000 to {JOIN_TTL_MS_MAX} are possible"),
        ));
    }
    let secret = random_hex().map_err(|error| Failure::internal(chain(&error)))?;
    let access = api.access(secret).await?;
    let now = api.consensus.clock().now_ms();
    let record = JoinTokenRecord {
        sha256: sha256_hex(access.secret.as_bytes()),
        created_at_ms: now,
        expires_at_ms: now.saturating_add(ttl),
    };
    let own = api.consensus.node();
    let addresses: Vec<_> = {
        let state = api.consensus.replica().state();
        // This node first: it is the one that surely works.
        let mine = state.node(own).and_then(|node| node.address);
        let others = state.nodes().filter(|node| node.id != own).filter_map(|node| node.address);
        mine.into_iter().chain(others).take(ADDRESSES_MAX).collect()
    };
    if addresses.is_empty() {
        return Err(Failure::unavailable("no node has said yet where it can be reached"));
    }
    let view = TokenView {
        name: record.sha256.chars().take(DIGEST_NAME).collect(),
        token: Some(JoinToken { access, expires_at_ms: record.expires_at_ms, addresses }.to_string()),
        created_at_ms: now,
        expires_at_ms: Some(record.expires_at_ms),
    };
    let command = Command::Member(Box::new(MemberCommand::PutJoinToken(record)));
    let (revision, _) = api.propose(None, command).await?;
    Ok(answer(StatusCode::CREATED, revision, &view))
}

/// `POST /v1/tokens`
pub async fn create_api_token(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let wanted = wanted(request).await?;
    let name = wanted.name.ok_or_else(|| Failure::field("name", "required", "is needed"))?;
    check_name(&name, false).map_err(|form| Failure::field("name", "bad_format", form))?;
    let secret = random_hex().map_err(|error| Failure::internal(chain(&error)))?;
    let access = api.access(secret).await?;
    let now = api.consensus.clock().now_ms();
    let record = ApiTokenRecord {
        name: name.clone(),
        sha256: sha256_hex(access.secret.as_bytes()),
        created_at_ms: now,
        expires_at_ms: wanted.ttl_ms.map(|ttl| now.saturating_add(ttl)),
    };
    let view = TokenView {
        name,
        token: Some(ApiToken(access).to_string()),
        created_at_ms: now,
        expires_at_ms: record.expires_at_ms,
    };
    let command = Command::Member(Box::new(MemberCommand::PutApiToken(record)));
    let (revision, _) = api.propose(None, command).await?;
    Ok(answer(StatusCode::CREATED, revision, &view))
}

fn tokens(revision: u64, items: Vec<TokenView>) -> Response {
    answer(StatusCode::OK, revision, &Page { items, cursor: None, revision })
}

/// `GET /v1/join-tokens`
pub async fn list_join_tokens(State(api): State<Shared>, uri: Uri) -> Result<Response, Failure> {
    Parameters::of(&uri, &[])?;
    let state = api.consensus.replica().state();
    let view = |token: &Arc<JoinTokenRecord>| TokenView {
        name: token.sha256.chars().take(DIGEST_NAME).collect(),
        token: None,
        created_at_ms: token.created_at_ms,
        expires_at_ms: Some(token.expires_at_ms),
    };
    Ok(tokens(state.revision(), state.join_tokens().map(view).collect()))
}

/// `GET /v1/tokens`
pub async fn list_api_tokens(State(api): State<Shared>, uri: Uri) -> Result<Response, Failure> {
    Parameters::of(&uri, &[])?;
    let state = api.consensus.replica().state();
    let view = |token: &Arc<ApiTokenRecord>| TokenView {
        name: token.name.clone(),
        token: None,
        created_at_ms: token.created_at_ms,
        expires_at_ms: token.expires_at_ms,
    };
    Ok(tokens(state.revision(), state.api_tokens().map(view).collect()))
}

/// `DELETE /v1/join-tokens/{name}`
pub async fn delete_join_token(
    State(api): State<Shared>,
    Path(name): Path<String>,
) -> Result<Response, Failure> {
    if name.len() < DIGEST_NAME {
        return Err(no_token(&name));
    }
    delete_token(&api, &name, MemberCommand::DeleteJoinToken { sha256: name.clone() }).await
}

/// `DELETE /v1/tokens/{name}`
pub async fn delete_api_token(
    State(api): State<Shared>,
    Path(name): Path<String>,
) -> Result<Response, Failure> {
    delete_token(&api, &name, MemberCommand::DeleteApiToken { name: name.clone() }).await
}

fn no_token(name: &str) -> Failure {
    Failure::not_found(format!("there is no token {name:?}"))
        .suggest("blixard token ls, blixard cluster token ls")
}

async fn delete_token(api: &Api, name: &str, command: MemberCommand) -> Result<Response, Failure> {
    match api.propose(None, Command::Member(Box::new(command))).await {
        Ok((revision, _)) => Ok(answer(StatusCode::OK, revision, &serde_json::json!({}))),
        Err(failure) if failure.status == StatusCode::FORBIDDEN => Err(no_token(name)),
        Err(failure) => Err(failure),
    }
}
