//! Builds the parts of a node, owns their tasks, and defines in which order they end.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blixard_agent_api::{AgentClient, held};
use blixard_api::client::{Client, ClientError, Host as ClientHost};
use blixard_api::cluster::{Admission, Applicant};
use blixard_api::token::JoinToken;
use blixard_netd_api::Subnet;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::error::Failure;
use crate::api::members::{self, Members};
use crate::api::serve::{self, ServeError};
use crate::api::{self, Api, port};
use crate::auth::authority::{self, NODE_VALID};
use crate::auth::identity::{Identity, Keys, new_key, public_key};
use crate::auth::keeper::Keeper;
use crate::auth::tls::Tls;
use crate::auth::{AuthError, random_hex};
use crate::clock::{self, Clock};
use crate::config::Config;
use crate::host::held::Teller;
use crate::host::local::Local;
use crate::host::renew::Renewer;
use crate::host::sync::HostSync;
use crate::host::{Agent, chain};
use crate::images::Importer;
use crate::images::blobs::{BlobError, BlobStore};
use crate::liveness;
use crate::metrics::Metrics;
use crate::raft::peer::Connect;
use crate::raft::peer::server::PeerServer;
use crate::raft::storage::Folder;
use crate::raft::{Consensus, ConsensusError, Opening, ProposeError, recover};
use crate::state::apply::DEFAULT_NETWORK;
use crate::state::command::LEASE_LEVEL;
use crate::state::{Command, MemberCommand, NetworkRecord, NodeId, Proposal, Refusal};

/// Number of the node that makes a cluster.
const FIRST_NODE: NodeId = 1;
/// What this program understands. 1: clusters of one node. 2: commands about the cluster itself. 3: placement and leases.
/// 4: health checks; declarations of nodes as down are counted by the log. 5: a node that has not told what it has takes no VM;
/// a VM keeps its room until its policy starts it again. 6: a cluster may have leases of another length.
pub fn feature_level() -> u32 {
    LEASE_LEVEL + u32::from(knows_next_level())
}

/// For tests of upgrades: a development build whose program file says `+1` here knows one level more, in which nothing is new
/// (`tests/all.sh` makes it). A cluster at that level could never run a real version again, so no other build can.
#[cfg(debug_assertions)]
fn knows_next_level() -> bool {
    static MARK: &[u8] = b"blixard-node-test-feature-level+0";
    std::hint::black_box(MARK).ends_with(b"+1")
}

#[cfg(not(debug_assertions))]
const fn knows_next_level() -> bool {
    false
}

/// How long a member waits at its start for a leader that confirms what it has.
const RECOVERY_MAX: Duration = Duration::from_secs(5);

/// Why a node cannot run, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// See [`ConsensusError`].
    #[error("consensus cannot begin")]
    Consensus(#[from] ConsensusError),
    /// See [`BlobError`].
    #[error("the content store is of no use")]
    Blobs(#[from] BlobError),
    /// See [`ServeError`].
    #[error("the API cannot be offered")]
    Serve(#[from] ServeError),
    /// The cluster cannot be made.
    #[error("the cluster cannot be made")]
    Propose(#[from] ProposeError),
    /// Replicated state refuses what a start needs.
    #[error("the cluster cannot be made")]
    Refused(#[source] Refusal),
    /// See [`AuthError`].
    #[error("this node's identity is of no use")]
    Identity(#[from] AuthError),
    /// This node's keys or the cluster's authority cannot be made.
    #[error("other nodes cannot be let in: {}", .0.body.message)]
    Found(Failure),
    /// The cluster does not take this node in.
    #[error("the cluster does not take this node in")]
    Join(#[source] Box<ClientError>),
    /// Two numbers have the same name.
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    /// It cannot be told which boot this is.
    #[error("cannot tell which boot this is")]
    Boot(#[source] std::io::Error),
    /// The network has an impossible subnet.
    #[error("the default network is not possible: {0}")]
    Network(String),
    /// Consensus stopped by itself: a disk failed. Going on would answer from old state.
    #[error("consensus has stopped: {0}")]
    Stopped(String),
}

/// Why a node starts its parts anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// It has another identity.
    Again,
}

/// Runs a node until `stop`. `ready` is called once it answers. When it gets another identity (other nodes may join it, or it
/// joins others) its parts end and start anew within the process; its VMs do not notice.
///
/// # Errors
/// See [`NodeError`].
pub async fn run(config: Config, stop: CancellationToken, ready: impl FnOnce()) -> Result<(), NodeError> {
    if config.force_new_cluster {
        let node = Keys::load(&config.state)?.map_or(FIRST_NODE, |keys| keys.identity.node);
        let done = recover::force_new_cluster(&config.state.join("raft"), node).await?;
        tracing::warn!(last_log = done.last_log, removed = ?done.removed, "this node is the only voter now");
        return Ok(());
    }
    let mut ready = Some(ready);
    loop {
        let tell = || {
            if let Some(ready) = ready.take() {
                ready();
            }
        };
        match start(&config, &stop, tell).await? {
            None => return Ok(()),
            Some(Restart::Again) => tracing::info!("this node starts its parts anew"),
        }
    }
}

async fn start(
    config: &Config,
    stop: &CancellationToken,
    ready: impl FnOnce(),
) -> Result<Option<Restart>, NodeError> {
    let blobs = BlobStore::open_at(&config.state)?;
    // The sockets come first: a second node on the same folder ends here, before it touches anything.
    let unix = serve::unix(&config.socket, config.socket_mode, config.socket_group.as_deref())?;
    let tcp = match config.listen {
        Some(address) => Some(serve::tcp(address).await?),
        None => None,
    };
    let raft = config.state.join("raft");
    Keys::take_next(&config.state, || remove_folder(&raft))?;
    let mut keys = Keys::load(&config.state)?;
    if let (None, Some(token), Some((address, bind))) = (&keys, &config.join, config.address) {
        keys = Some(join_at_start(config, token, address, bind).await?);
    }
    if let (Some(keys), Some((address, bind))) = (&mut keys, config.address) {
        (keys.identity.address, keys.identity.bind) = (address, bind);
    }
    let tls = keys.map(Tls::new).transpose()?;
    let opening = Opening {
        storage: &Folder::make(&raft)?,
        node: tls.as_ref().map_or(FIRST_NODE, |tls| tls.identity().node),
        founder: tls.is_none(),
        snapshot_after: config.snapshot_after,
        election_timeout_ms: config.election_timeout_ms,
        way: tls.clone().map(|tls| Arc::new(tls) as Arc<dyn Connect>),
        clock: Clock::default(),
    };
    let consensus = Consensus::open(opening).await?;
    let alone = tls.is_none() || consensus.is_alone();
    if alone {
        consensus.recovered().await?;
        begin(&consensus, config).await?;
        if let (None, Some((address, bind))) = (&tls, config.address) {
            let keys = found(&consensus, consensus.node(), address, bind).await.map_err(NodeError::Found)?;
            keys.store(&config.state)?;
            consensus.shutdown().await;
            std::fs::remove_file(&config.socket).ok();
            return Ok(Some(Restart::Again));
        }
    }

    let local = Arc::new(Local::default());
    let agent: Arc<dyn Agent> = Arc::new(AgentClient::new(&config.agent));
    let renewer =
        Renewer { agent: Arc::clone(&agent), consensus: consensus.clone(), local: Arc::clone(&local) };
    let sync = HostSync {
        agent: Arc::clone(&agent),
        consensus: consensus.clone(),
        blobs: blobs.clone(),
        local: Arc::clone(&local),
        resolvers: config.resolvers.clone(),
    };
    let teller = Teller {
        consensus: consensus.clone(),
        local: Arc::clone(&local),
        path: config.socket.with_file_name(held::FILE),
        boot: held::boot_id().map_err(NodeError::Boot)?,
    };
    // These parts end with the process, or before it when the node starts anew.
    let parts = stop.child_token();
    let (restart, mut restarts) = watch::channel(None);
    let api = Arc::new(Api {
        consensus: consensus.clone(),
        local,
        agent,
        importer: Importer::new(blobs.clone(), config.init.clone()),
        default_kernel: tokio::sync::Mutex::default(),
        metrics: Metrics::new(&config.name)?,
        node_name: config.name.clone(),
        tls: tls.clone(),
        folder: config.state.clone(),
        labels: config.labels.clone(),
        restart,
        stop: parts.clone(),
    });
    let mut tasks = JoinSet::new();
    let router = api::router(Arc::clone(&api));
    if let Some(tls) = &tls {
        let identity = tls.identity();
        let listener = port::listen(identity.bind).await?;
        let (requests, members) = mpsc::channel(members::WAITING_MAX);
        let peers = PeerServer::new(
            consensus.clone(),
            identity.cluster,
            raft,
            blobs.clone(),
            requests,
            parts.clone(),
        );
        let of_members = members::router(Arc::clone(&api));
        tasks.spawn(serve::serve(Members::new(members), of_members, parts.clone()));
        let users = port::open(listener, tls.clone(), peers, parts.clone());
        tasks.spawn(serve::serve(users, port::for_users(router.clone(), Arc::clone(&api)), parts.clone()));
        tracing::info!(address = %identity.address, node = identity.node, "other nodes and users are served");
    }
    if !alone && tokio::time::timeout(RECOVERY_MAX, consensus.recovered()).await.is_err() {
        tracing::warn!("no leader confirms yet what this node has: it answers from what it knows");
    }
    Api::sweep(Arc::clone(&api)).await;
    if let Some(listener) = tcp {
        tracing::warn!(address = ?config.listen, "the API is open to every user of this host");
        tasks.spawn(serve::serve(listener, serve::for_tcp(router.clone()), parts.clone()));
    }
    let keeper = Keeper {
        consensus: consensus.clone(),
        tls,
        folder: config.state.clone(),
        name: config.name.clone(),
        labels: config.labels.clone(),
    };
    drop(api);
    tasks.spawn(serve::serve(unix, router, parts.clone()));
    tasks.spawn(sync.run(parts.clone()));
    tasks.spawn(keeper.run(parts.clone()));
    tasks.spawn(consensus.clone().keep_members(parts.clone()));
    tasks.spawn(crate::upkeep::run(consensus.clone(), parts.clone()));
    tasks.spawn(liveness::watch::beat(consensus.clone(), parts.clone()));
    tasks.spawn(liveness::watch::detect(consensus.clone(), parts.clone()));
    tasks.spawn(renewer.run(parts.clone()));
    tasks.spawn(teller.run(parts.clone()));
    tracing::info!(node = config.name, socket = %config.socket.display(), "ready");
    ready();

    // Each entry wakes whoever watches openraft: a task, which is cheaper to wake than this thread.
    let watched = consensus.clone();
    let mut stopped = tokio::spawn(async move { watched.stopped().await });
    let result = tokio::select! {
        () = stop.cancelled() => Ok(None),
        reason = &mut stopped => Err(NodeError::Stopped(reason.unwrap_or_else(|error| error.to_string()))),
        Ok(again) = restarts.wait_for(Option::is_some) => Ok(*again),
    };
    stopped.abort();
    if stop.is_cancelled() {
        consensus.hand_over().await;
    }
    parts.cancel();
    // Requests first, since they need consensus to be answered; consensus last.
    while tasks.join_next().await.is_some() {}
    consensus.shutdown().await;
    std::fs::remove_file(&config.socket).ok();
    result
}

fn remove_folder(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes the cluster's authority if there is none, and keys for this node.
///
/// # Errors
/// What the state refuses, or what is in the way of keys.
pub async fn found(
    consensus: &Consensus,
    node: NodeId,
    address: SocketAddr,
    bind: SocketAddr,
) -> Result<Keys, Failure> {
    let wrong = |error: AuthError| Failure::internal(chain(&error));
    let known = consensus.replica().state().trust().cloned();
    let trust = match known {
        Some(trust) => trust,
        None => {
            let cluster = authority::cluster_id(clock::now_ms(), &random_hex().map_err(wrong)?);
            let trust = authority::begin(&cluster, clock::now_ms()).map_err(wrong)?;
            let command = Command::Member(Box::new(MemberCommand::SetTrust(Box::new(trust.clone()))));
            let proposal = Proposal { now_ms: clock::now_ms(), key: None, command };
            consensus.propose(proposal).await?.1?;
            Arc::new(trust)
        }
    };
    let (key_pem, public) = new_key().map_err(wrong)?;
    let certificate =
        authority::certify(&trust, node, &public, clock::now_ms(), NODE_VALID).map_err(wrong)?;
    Ok(Keys {
        identity: Identity {
            cluster: trust.cluster.clone(),
            node,
            address,
            bind,
            trust_version: trust.version,
        },
        key_pem,
        certificate_pem: certificate,
        authorities_pem: trust.authorities_pem(),
    })
}

/// Asks a cluster to take this node in: at each of the token's addresses, until one answers.
///
/// # Errors
/// The refusal, or why the last address does not answer.
pub async fn join(token: &JoinToken, applicant: &Applicant) -> Result<Admission, ClientError> {
    let mut last = ClientError::BadRequest("the token has no address".into());
    for address in &token.addresses {
        let host = ClientHost::Https(address.to_string(), Some(Box::new(token.access.clone())));
        match Client::new(host).apply_to_join(applicant).await {
            Err(error) if error.refusal().is_none_or(|refusal| refusal.error.retryable) => last = error,
            other => return other,
        }
    }
    Err(last)
}

async fn join_at_start(
    config: &Config,
    token: &JoinToken,
    address: SocketAddr,
    bind: SocketAddr,
) -> Result<Keys, NodeError> {
    // Kept before it is used: a repetition after a crash is then one of the same node.
    let kept = config.state.join("join.key");
    let key_pem = match std::fs::read_to_string(&kept) {
        Ok(key) => key,
        Err(_) => {
            let (key, _) = new_key()?;
            crate::auth::identity::replace(&kept, &key)?;
            key
        }
    };
    let applicant = Applicant {
        name: config.name.clone(),
        address,
        public_key: public_key(&key_pem)?,
        labels: config.labels.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        feature_level: feature_level(),
    };
    let admission = join(token, &applicant).await.map_err(|error| NodeError::Join(Box::new(error)))?;
    let (node, trust_version) = (admission.node, admission.trust_version);
    let identity = Identity { cluster: admission.cluster, node, address, bind, trust_version };
    let keys = Keys {
        identity,
        key_pem,
        certificate_pem: admission.certificate_pem,
        authorities_pem: admission.authorities_pem,
    };
    keys.store(&config.state)?;
    std::fs::remove_file(&kept).ok();
    Ok(keys)
}

/// Makes the cluster at the first start, and gives this node its present name.
async fn begin(consensus: &Consensus, config: &Config) -> Result<(), NodeError> {
    let made = consensus.replica().state().cluster().is_some();
    let node = consensus.node();
    let command = if made {
        Command::RenameNode { node, name: config.name.clone() }
    } else {
        let network = NetworkRecord {
            name: DEFAULT_NETWORK.into(),
            v4: config.network_v4,
            v6: config.network_v6.unwrap_or_else(random_prefix),
            nat: true,
            mtu: 1500,
            next_host: 2,
        };
        let spec = blixard_netd_api::NetworkSpec {
            name: network.name.clone(),
            subnets: vec![network.v4, network.v6],
            nat: network.nat,
            mtu: network.mtu,
        };
        spec.validate().map_err(NodeError::Network)?;
        let node_name = config.name.clone();
        let lease_ms = config.lease_ms;
        Command::InitCluster { feature_level: feature_level(), network, node, node_name, lease_ms }
    };
    let known = consensus.replica().state().node(node).is_some_and(|record| record.name == config.name);
    if made && known {
        return Ok(());
    }
    let (_, outcome) = consensus.propose(Proposal { now_ms: clock::now_ms(), key: None, command }).await?;
    outcome.map(|_| ()).map_err(NodeError::Refused)
}

/// A unique local prefix (RFC 4193 section 3.2.1: fd, 40 random bits, a subnet number).
fn random_prefix() -> Subnet {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(clock::now_ms()).to_be_bytes();
    let [a, b, c, d, e, ..] = random;
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    let gateway = Ipv6Addr::new(pair(0xfd, a), pair(b, c), pair(d, e), 0, 0, 0, 0, 1);
    Subnet { gateway: IpAddr::V6(gateway), prefix: 64 }
}
