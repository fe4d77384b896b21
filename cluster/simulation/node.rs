//! One run of the process of a node: the parts that `blixard_node::node` puts together, on a simulated host. It ends without warning;
//! what is left of it reaches neither disk nor network nor agent.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blixard_node::clock::{Clock, Time};
use blixard_node::host::local::Local;
use blixard_node::host::renew::Renewer;
use blixard_node::host::sync::HostSync;
use blixard_node::images::blobs::BlobStore;
use blixard_node::raft::peer::server::PeerServer;
use blixard_node::raft::{Consensus, ConsensusError, ELECTION_TIMEOUT_MS, Opening};
use blixard_node::state::NodeId;
use blixard_node::{liveness, upkeep};
use tokio_util::sync::CancellationToken;

use crate::disk::Disk;
use crate::host::Host;
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
    /// Its part in the cluster.
    pub consensus: Consensus,
    alive: Arc<AtomicBool>,
    /// Cancelled when it ends.
    pub stop: CancellationToken,
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
        let blobs = BlobStore::open_at(folder)
            .map_err(|error| ConsensusError::Raft { what: "use a folder", reason: error.to_string() })?;
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
        let sync = HostSync { agent, consensus: consensus.clone(), blobs, local, resolvers: Vec::new() };
        tokio::spawn(sync.run(stop.clone()));
        tokio::spawn(consensus.clone().keep_members(stop.clone()));
        tokio::spawn(upkeep::run(consensus.clone(), stop.clone()));
        tokio::spawn(liveness::watch::beat(consensus.clone(), stop.clone()));
        tokio::spawn(liveness::watch::detect(consensus.clone(), stop.clone()));
        tokio::spawn(renewer.run(stop.clone()));
        Ok(Self { run, consensus, alive, stop })
    }

    /// Ends it at once. Without power (`dark`) nobody tells the others.
    pub fn kill(self, network: &Network, dark: bool) {
        self.alive.store(false, Ordering::SeqCst);
        network.end(self.run, dark);
        self.stop.cancel();
        // Only so that nothing of it is left over.
        tokio::spawn(self.consensus.shutdown());
    }
}
