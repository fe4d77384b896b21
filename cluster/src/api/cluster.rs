//! The cluster itself: status, forming it, leadership, the authority, the feature level.

use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::Response;
use blixard_api::check_name;
use blixard_api::cluster::{
    Admission, Applicant, ClusterStatus, InitCluster, JoinCluster, RaiseLevel, TransferLeader,
};
use blixard_api::token::JoinToken;

use super::error::Failure;
use super::query::Parameters;
use super::{Api, Shared, answer, body};
use crate::auth::access::bearer;
use crate::auth::authority::{self, NODE_VALID};
use crate::auth::identity::{Identity, Keys, new_key, public_key};
use crate::auth::{AuthError, sha256_hex};
use crate::clock;
use crate::host::chain;
use crate::node::{Restart, feature_level, join};
use crate::state::{Answer, Command, MemberCommand, NodeFacts, NodeStatus};

/// Longest wait until another node leads.
const TRANSFER_MAX: Duration = Duration::from_secs(5);

/// A failure of keys or certificates.
fn auth_failure(error: &AuthError) -> Failure {
    Failure::internal(chain(error))
}

/// `GET /v1/cluster`
pub async fn status(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    let parameters = Parameters::of(request.uri(), &["linearizable", "min_revision", "timeout_ms"])?;
    api.at_least(&parameters).await?;
    let revision = api.consensus.replica().state().revision();
    Ok(answer(StatusCode::OK, revision, &api.status()))
}

/// `POST /v1/cluster:{verb}`
pub async fn act(
    State(api): State<Shared>,
    Path(verb): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    match verb.as_str() {
        "init" => init(&api, request).await,
        "join" => admit(&api, request).await,
        "transfer-leader" => transfer(&api, request).await,
        "rotate-authority" => rotate(&api, request).await,
        "raise-level" => raise(&api, request).await,
        other => Err(Failure::not_found(format!("the cluster knows no {other:?}"))
            .suggest(":init :join :transfer-leader :rotate-authority :raise-level")),
    }
}

async fn json<T: serde::de::DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let (parts, content) = request.into_parts();
    Parameters::of(&parts.uri, &[])?;
    let bytes = body::read(&parts.headers, content).await?;
    body::parse(&bytes)?.complete()
}

async fn init(api: &Shared, request: Request) -> Result<Response, Failure> {
    let wanted: InitCluster = json(request).await?;
    if api.tls.is_some() {
        return Err(Failure::conflict("other nodes can join this one already")
            .suggest("blixard cluster token create makes a token for one"));
    }
    let bind = wanted.bind.unwrap_or(wanted.address);
    check_address(wanted.address, bind).await?;
    make_identity(api, wanted.address, bind).await?;
    api.restart.send_replace(Some(Restart::Again));
    let revision = api.consensus.replica().state().revision();
    Ok(answer(StatusCode::OK, revision, &api.status()))
}

/// Makes the cluster's authority if there is none, and this node's keys.
///
/// # Errors
/// What the state refuses, or what is in the way of keys.
pub async fn make_identity(
    api: &Api,
    address: std::net::SocketAddr,
    bind: std::net::SocketAddr,
) -> Result<(), Failure> {
    let node = api.consensus.node();
    let keys = crate::node::found(&api.consensus, node, address, bind).await?;
    keys.store(&api.folder).map_err(|error| auth_failure(&error))
}

async fn check_address(address: std::net::SocketAddr, bind: std::net::SocketAddr) -> Result<(), Failure> {
    if address.ip().is_unspecified() || address.port() == 0 {
        let text = "an address by which other hosts reach this one is needed, with a port";
        return Err(Failure::field("address", "bad_format", text));
    }
    // Found out now rather than after everything was ended.
    match tokio::net::TcpListener::bind(bind).await {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Failure::field("address", "bad_format", format!("cannot listen at {bind}: {error}")))
        }
    }
}

/// A node asks to join.
async fn admit(api: &Api, request: Request) -> Result<Response, Failure> {
    let said = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let secret = said.and_then(bearer).map(str::to_owned);
    let secret = secret.ok_or_else(|| Failure::unauthenticated("the secret of a join token is needed"))?;
    let applicant: Applicant = json(request).await?;
    check_name(&applicant.name, false).map_err(|form| Failure::field("name", "bad_format", form))?;
    if authority::public_key_bytes(&applicant.public_key).is_none() {
        return Err(Failure::field("public_key", "bad_format", "64 hexadecimal digits are needed"));
    }
    if applicant.labels.len() > 64 || applicant.labels.iter().any(|(k, v)| k.len() > 63 || v.len() > 63) {
        return Err(Failure::field("labels", "out_of_range", "64 of 63 characters each are possible"));
    }
    let facts = NodeFacts {
        name: applicant.name,
        address: Some(applicant.address),
        public_key: Some(applicant.public_key),
        labels: applicant.labels,
        version: applicant.version.chars().take(64).collect(),
        feature_level: applicant.feature_level,
        trust_version: 0,
    };
    let command =
        MemberCommand::Join { token: sha256_hex(secret.as_bytes()), facts: Box::new(facts.clone()) };
    let result = api.propose(None, Command::Member(Box::new(command))).await;
    let (revision, node) = match result {
        Ok((revision, Answer::Node(node))) => (revision, node),
        Ok(_) => return Err(Failure::internal("the state answered with something else than a node")),
        Err(failure) => {
            tracing::warn!(name = facts.name, "a node may not join: {}", failure.body.message);
            return Err(failure);
        }
    };
    let trust = api.consensus.replica().state().trust().cloned();
    let trust = trust.ok_or_else(|| Failure::conflict("this cluster has no authority yet"))?;
    let key = node.public_key.as_deref().unwrap_or_default();
    let certificate = authority::certify(&trust, node.id, key, clock::now_ms(), NODE_VALID);
    let admission = Admission {
        node: node.id,
        cluster: trust.cluster.clone(),
        certificate_pem: certificate.map_err(|error| auth_failure(&error))?,
        authorities_pem: trust.authorities_pem(),
        trust_version: trust.version,
    };
    tracing::info!(name = node.name, node = node.id, "a node joins");
    Ok(answer(StatusCode::OK, revision, &admission))
}

async fn transfer(api: &Api, request: Request) -> Result<Response, Failure> {
    let wanted: TransferLeader = json(request).await?;
    let (voters, _) = api.consensus.standing();
    let to = match &wanted.to {
        Some(name) => {
            let state = api.consensus.replica().state();
            state.node_named(name).map(|node| node.id).ok_or_else(|| super::nodes::no_node(name))?
        }
        None => {
            let state = api.consensus.replica().state();
            let up = |node| state.node(node).is_some_and(|node| node.offer.status == NodeStatus::Up);
            let mut others = voters.into_iter().filter(|node| Some(*node) != api.consensus.leader_id());
            others.find(|node| up(*node)).ok_or_else(|| Failure::conflict("no other voter is up"))?
        }
    };
    api.consensus.transfer(to, TRANSFER_MAX).await.map_err(|reason| {
        Failure::conflict(format!("leadership was not handed over: {reason}")).retryable()
    })?;
    let revision = api.consensus.replica().state().revision();
    Ok(answer(StatusCode::OK, revision, &api.status()))
}

async fn rotate(api: &Api, request: Request) -> Result<Response, Failure> {
    Parameters::of(request.uri(), &[])?;
    let trust = api.consensus.replica().state().trust().cloned();
    let trust = trust.ok_or_else(|| Failure::conflict("this cluster has no authority yet"))?;
    if trust.authorities.len() > 1 {
        return Err(
            Failure::conflict("a change of the authority is under way").suggest("blixard cluster status")
        );
    }
    let next = authority::make(&trust.cluster, clock::now_ms()).map_err(|error| auth_failure(&error))?;
    let mut changed = trust.as_ref().clone();
    changed.version = changed.version.saturating_add(1);
    changed.authorities.push(next);
    let command = Command::Member(Box::new(MemberCommand::SetTrust(Box::new(changed))));
    let (revision, _) = api.propose(None, command).await?;
    Ok(answer(StatusCode::OK, revision, &api.status()))
}

async fn raise(api: &Api, request: Request) -> Result<Response, Failure> {
    let wanted: RaiseLevel = json(request).await?;
    let level = wanted.level.unwrap_or(feature_level());
    if level > feature_level() {
        let text = format!("this node knows up to {}", feature_level());
        return Err(Failure::field("level", "out_of_range", text));
    }
    let command = MemberCommand::RaiseLevel { level, node: api.consensus.node(), knows: feature_level() };
    let (revision, _) = api.propose(None, Command::Member(Box::new(command))).await?;
    Ok(answer(StatusCode::OK, revision, &api.status()))
}

/// `POST /v1/node:{verb}`
pub async fn act_on_this(
    State(api): State<Shared>,
    Path(verb): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    if verb != "join" {
        return Err(Failure::not_found(format!("a node knows no {verb:?}")).suggest(":join"));
    }
    let wanted: JoinCluster = json(request).await?;
    let token: JoinToken =
        wanted.token.parse().map_err(|error| Failure::field("token", "bad_format", format!("{error}")))?;
    let bind = wanted.bind.unwrap_or(wanted.address);
    {
        let state = api.consensus.replica().state();
        if state.nodes().count() > 1 || api.tls.is_some() {
            return Err(Failure::conflict("this node is a member of a cluster that others can join")
                .suggest("remove it there and begin with an empty state folder"));
        }
        if state.vm_count() > 0 {
            return Err(Failure::conflict("this node has VMs, which it would forget")
                .suggest("blixard rm them first"));
        }
    }
    check_address(wanted.address, bind).await?;
    let (key_pem, _) = new_key().map_err(|error| auth_failure(&error))?;
    let public = public_key(&key_pem).map_err(|error| auth_failure(&error))?;
    let applicant = Applicant {
        name: api.node_name.clone(),
        address: wanted.address,
        public_key: public,
        labels: api.labels.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        feature_level: feature_level(),
    };
    let admission = join(&token, &applicant).await.map_err(|error| match error.refusal() {
        Some(refusal) => Failure::denied(format!("the cluster refuses: {}", refusal.error.message)),
        None => Failure::unavailable(format!("the cluster cannot be reached: {}", chain(&error))),
    })?;
    let identity = Identity {
        cluster: admission.cluster.clone(),
        node: admission.node,
        address: wanted.address,
        bind,
        trust_version: admission.trust_version,
    };
    let keys = Keys {
        identity,
        key_pem,
        certificate_pem: admission.certificate_pem.clone(),
        authorities_pem: admission.authorities_pem.clone(),
    };
    keys.store_next(&api.folder).map_err(|error| auth_failure(&error))?;
    api.restart.send_replace(Some(Restart::Again));
    Ok(answer(StatusCode::OK, 0, &admission))
}

impl Api {
    fn status(&self) -> ClusterStatus {
        let numbers = self.consensus.numbers();
        let (voters, _) = self.consensus.standing();
        let state = self.consensus.replica().state();
        ClusterStatus {
            cluster: state.trust().map(|trust| trust.cluster.clone()),
            leader: self
                .consensus
                .leader_id()
                .map(|id| state.node(id).map_or_else(|| format!("number {id}"), |node| node.name.clone())),
            term: numbers.term,
            feature_level: state.cluster().map_or(0, |cluster| cluster.feature_level),
            feature_level_known: feature_level(),
            lease_ms: state.cluster().map_or(0, |cluster| cluster.lease_ms),
            nodes: state.nodes().count(),
            voters: state
                .nodes()
                .filter(|node| voters.contains(&node.id))
                .map(|node| node.name.clone())
                .collect(),
            rotating: state.trust().is_some_and(|trust| trust.authorities.len() > 1),
            applied: numbers.applied,
            last_log: numbers.last_log,
        }
    }
}
