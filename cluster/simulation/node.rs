//! One run of the process of a node: the parts that `blixard_node::node` puts together, on a simulated host. It ends without warning;
//! what is left of it reaches neither disk nor network nor agent.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blixard_node::api::{self, Api};
use blixard_node::clock::{Clock, Time};
use blixard_node::host::local::Local;
use blixard_node::host::renew::Renewer;
use blixard_node::host::sync::HostSync;
use blixard_node::images::Importer;
use blixard_node::images::blobs::BlobStore;
use blixard_node::metrics::Metrics;
use blixard_node::raft::peer::server::PeerServer;
use blixard_node::raft::{Consensus, ConsensusError, ELECTION_TIMEOUT_MS, Opening};
use blixard_node::state::NodeId;
use blixard_node::{liveness, upkeep};
use tokio_util::sync::CancellationToken;

use crate::disk::Disk;
use crate::host::Host;
use crate::member::Member;
use crate::network::{Network, Run};
use crate::trace::Trace;

/// Entries after which the log is cut: few, so that snapshots are made and sent.
const SNAPSHOT_AFTER: u64 = 150;

/// What a node runs on.
pub struct Machine {
    /// The host and its agent.
    pub host: Arc<Host>,
    /// Its disk.
    pub disk: Disk,
    /// Its network.
    pub network: Network,
    /// What happens.
    pub trace: Trace,
}

/// A run of a node.
pub struct Node {
    /// Which.
    pub run: Run,
    /// What it is for others.
    pub member: Member,
    alive: Arc<AtomicBool>,
}

impl Node {
    /// Starts a node.
    ///
    /// # Errors
    /// It cannot run with what its disk holds.
    pub async fn start(
        machine: &Machine,
        run: Run,
        founder: bool,
        folder: &Path,
    ) -> Result<Self, ConsensusError> {
        let (node, _) = run;
        let alive = Arc::new(AtomicBool::new(true));
        let trace = machine.trace.clone();
        let storage = machine.disk.mount(format!("{node}"), Arc::clone(&alive), trace.clone());
        let opening = Opening {
            storage: &storage,
            node,
            founder,
            snapshot_after: SNAPSHOT_AFTER,
            election_timeout_ms: ELECTION_TIMEOUT_MS,
            way: Some(machine.network.of(run)),
            clock: Clock::new(Arc::clone(&machine.host.clock) as Arc<dyn Time>),
        };
        let consensus = Consensus::open(opening).await?;
        let stop = CancellationToken::new();
        let unusable =
            |what, error: &dyn std::fmt::Display| ConsensusError::Raft { what, reason: error.to_string() };
        let blobs = BlobStore::open_at(folder).map_err(|error| unusable("use a folder", &error))?;
        let peers = PeerServer::new(
            consensus.clone(),
            "simulation".into(),
            folder.to_owned(),
            blobs.clone(),
            // No user's request is passed on.
            tokio::sync::mpsc::channel(1).0,
            stop.clone(),
        );
        let serve = move |end, from: NodeId| {
            let peers = peers.clone();
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
            tokio::spawn(peers.serve_member(end, from, address));
        };
        machine.network.listen(run, Arc::new(serve));
        let local = Arc::new(Local::default());
        let agent = machine.host.link(Arc::clone(&alive));
        let renewer =
            Renewer { agent: Arc::clone(&agent), consensus: consensus.clone(), local: Arc::clone(&local) };
        let metrics = Metrics::new("simulated");
        let metrics = metrics.map_err(|error| unusable("count", &error))?;
        // Nothing tells it to start anew, and nobody outside reaches it.
        let (restart, _) = tokio::sync::watch::channel(None);
        let api = api::router(Arc::new(Api {
            consensus: consensus.clone(),
            local: Arc::clone(&local),
            agent: Arc::clone(&agent),
            importer: Importer::new(blobs.clone(), folder.join("init")),
            default_kernel: tokio::sync::Mutex::default(),
            metrics,
            node_name: format!("n{node}"),
            tls: None,
            folder: folder.to_owned(),
            labels: BTreeMap::new(),
            restart,
            stop: stop.clone(),
        }));
        let sync = HostSync { agent, consensus: consensus.clone(), blobs, local, resolvers: Vec::new() };
        tokio::spawn(sync.run(stop.clone()));
        tokio::spawn(consensus.clone().keep_members(stop.clone()));
        tokio::spawn(upkeep::run(consensus.clone(), stop.clone()));
        tokio::spawn(liveness::watch::beat(consensus.clone(), stop.clone()));
        tokio::spawn(liveness::watch::detect(consensus.clone(), stop.clone()));
        tokio::spawn(renewer.run(stop.clone()));
        Ok(Self { run, member: Member { consensus, alive: stop, api }, alive })
    }

    /// Ends it at once. Without power (`dark`) nobody tells the others.
    pub fn kill(self, network: &Network, dark: bool) {
        self.alive.store(false, Ordering::SeqCst);
        network.end(self.run, dark);
        self.member.alive.cancel();
        // Only so that nothing of it is left over.
        tokio::spawn(self.member.consensus.shutdown());
    }
}
