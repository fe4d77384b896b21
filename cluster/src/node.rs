//! Builds the parts of a node, owns their tasks, and defines in which order they end.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use blixard_agent_api::AgentClient;
use blixard_netd_api::Subnet;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::serve::{self, ServeError};
use crate::api::{self, Api};
use crate::clock;
use crate::config::Config;
use crate::host::Agent;
use crate::host::local::Local;
use crate::host::sync::HostSync;
use crate::images::Importer;
use crate::images::blobs::{BlobError, BlobStore};
use crate::metrics::Metrics;
use crate::raft::{Consensus, ConsensusError, ProposeError};
use crate::state::apply::DEFAULT_NETWORK;
use crate::state::{Command, NetworkRecord, NodeId, Proposal, Refusal};

/// Number of the node that makes a cluster.
const FIRST_NODE: NodeId = 1;
/// What this program understands.
pub const FEATURE_LEVEL: u32 = 1;

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
    /// Two numbers have the same name.
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    /// The network has an impossible subnet.
    #[error("the default network is not possible: {0}")]
    Network(String),
    /// Consensus stopped by itself: a disk failed. Going on would answer from old state.
    #[error("consensus has stopped: {0}")]
    Stopped(String),
}

/// Runs a node until `stop`. `ready` is called once it answers.
///
/// # Errors
/// See [`NodeError`].
pub async fn run(config: Config, stop: CancellationToken, ready: impl FnOnce()) -> Result<(), NodeError> {
    let blobs = BlobStore::open_at(&config.state)?;
    // The sockets come first: a second node on the same folder ends here, before it touches anything.
    let unix = serve::unix(&config.socket, config.socket_mode, config.socket_group.as_deref())?;
    let tcp = match config.listen {
        Some(address) => Some(serve::tcp(address).await?),
        None => None,
    };
    let consensus =
        Consensus::open(&config.state.join("raft"), FIRST_NODE, &config.name, config.snapshot_after).await?;
    consensus.recovered().await?;
    begin(&consensus, &config).await?;

    let local = Arc::new(Local::default());
    let agent: Arc<dyn Agent> = Arc::new(AgentClient::new(&config.agent));
    let sync = HostSync {
        agent: Arc::clone(&agent),
        consensus: consensus.clone(),
        blobs: blobs.clone(),
        local: Arc::clone(&local),
        resolvers: config.resolvers.clone(),
    };
    let api = Arc::new(Api {
        consensus: consensus.clone(),
        local,
        agent,
        importer: Importer::new(blobs, config.init.clone()),
        default_kernel: tokio::sync::Mutex::default(),
        metrics: Metrics::new(&config.name)?,
        node_name: config.name.clone(),
        stop: stop.clone(),
    });
    Api::sweep(Arc::clone(&api)).await;

    let mut tasks = JoinSet::new();
    let router = api::router(api);
    if let Some(listener) = tcp {
        tracing::warn!(address = ?config.listen, "the API is open to every user of this host");
        tasks.spawn(serve::serve(listener, serve::for_tcp(router.clone()), stop.clone()));
    }
    tasks.spawn(serve::serve(unix, router, stop.clone()));
    tasks.spawn(sync.run(stop.clone()));
    tracing::info!(node = config.name, socket = %config.socket.display(), "ready");
    ready();

    let result = tokio::select! {
        () = stop.cancelled() => Ok(()),
        reason = consensus.stopped() => Err(NodeError::Stopped(reason)),
    };
    stop.cancel();
    // Requests first, since they need consensus to be answered; consensus last.
    while tasks.join_next().await.is_some() {}
    consensus.shutdown().await;
    std::fs::remove_file(&config.socket).ok();
    result
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
        Command::InitCluster { feature_level: FEATURE_LEVEL, network, node, node_name }
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
