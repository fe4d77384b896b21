//! A small cluster for tests.

use blixard_agent_api::{BlobRef, Digest};
use blixard_api::VmId;
use blixard_api::image::ImageConfig;
use blixard_netd_api::Subnet;

use super::command::ROOM_LEVEL;
use super::placement::{Capacity, NodeChange};
use super::{Answer, Command, ImageRecord, KernelRecord, NetworkRecord, Outcome, Proposal, State, VmRecord};

/// Content that is not there.
pub fn blob(number: u8) -> BlobRef {
    BlobRef { digest: Digest::from_bytes([number; 32]), size_bytes: u64::from(number) }
}

/// An image whose content is number 1.
pub fn image(name: &str) -> ImageRecord {
    ImageRecord {
        name: name.into(),
        blob: blob(1),
        fs: "erofs".into(),
        created_at_ms: 1,
        config: ImageConfig { command: vec!["/bin/sh".into()], ..ImageConfig::default() },
    }
}

/// A kernel whose content is numbers 2 and 3.
pub fn kernel(name: &str) -> KernelRecord {
    KernelRecord {
        name: name.into(),
        release: "6.1.0".into(),
        kernel: blob(2),
        initramfs: blob(3),
        modules: vec![],
        created_at_ms: 1,
    }
}

/// The command that makes the cluster, with a network of this prefix length.
pub fn init(prefix: u8) -> Command {
    let network = NetworkRecord {
        name: "default".into(),
        v4: Subnet { gateway: "10.88.0.1".parse().unwrap(), prefix },
        v6: Subnet { gateway: "fd62:1::1".parse().unwrap(), prefix: 64 },
        nat: true,
        mtu: 1500,
        next_host: 2,
    };
    Command::InitCluster {
        feature_level: crate::node::feature_level(),
        network,
        node: 1,
        node_name: "one".into(),
        lease_ms: super::records::LEASE_MS,
    }
}

/// A node tells that it has room for any VM that a test makes.
pub fn tell(node: super::NodeId) -> Command {
    let capacity =
        Capacity { cpus: 1 << 24, memory_mib: 1 << 40, disk_mib: 1 << 40, arch: Default::default() };
    Command::Node { node, change: NodeChange::Capacity(capacity) }
}

/// The command that makes a VM of the image `img`.
pub fn create(number: u128, name: &str) -> Command {
    let spec = serde_json::from_str(r#"{"image":"img"}"#).unwrap();
    let project = "default".into();
    Command::CreateVm {
        id: id(number),
        project,
        name: name.into(),
        spec: Box::new(spec),
        node: 1,
        waits: false,
    }
}

/// An id.
pub fn id(number: u128) -> VmId {
    VmId::from_parts(1_795_000_000_000, number)
}

/// A state that counts its revisions by itself.
#[derive(Default)]
pub struct Cluster {
    /// The state.
    pub state: State,
    revision: u64,
    /// The proposer's clock.
    pub now_ms: u64,
}

impl Cluster {
    /// A cluster with an image, a kernel and a network of this prefix length.
    pub fn new(prefix: u8) -> Self {
        Self::at_level(prefix, crate::node::feature_level())
    }

    /// The same with this feature level.
    pub fn at_level(prefix: u8, level: u32) -> Self {
        let mut cluster = Self { now_ms: 1_795_000_000_000, ..Self::default() };
        let mut command = init(prefix);
        if let Command::InitCluster { feature_level, .. } = &mut command {
            *feature_level = level;
        }
        cluster.run(command).unwrap();
        cluster.run(Command::PutImage(Box::new(image("img")))).unwrap();
        cluster.run(Command::PutKernel(Box::new(kernel("default")))).unwrap();
        if level >= ROOM_LEVEL {
            cluster.run(tell(1)).unwrap();
        }
        cluster
    }

    /// The same with nodes 1 to `nodes`.
    pub fn with_nodes(prefix: u8, nodes: u64) -> Self {
        let mut cluster = Self::new(prefix);
        for id in 2..=nodes {
            let mut record = super::NodeRecord::new(id, &format!("n{id}"));
            record.plan_generation = 1;
            cluster.state.nodes.insert(id, std::sync::Arc::new(record));
            cluster.state.changed.insert(super::RecordKey::Node(id));
        }
        cluster.state.loaded();
        cluster
    }

    /// A node is suspected and, if that is possible, declared down.
    pub fn lose(&mut self, node: super::NodeId) -> Outcome {
        self.run(Command::Node { node, change: NodeChange::Suspect })?;
        let suspicion = self.state.node(node).unwrap().offer.suspicion;
        self.run(Command::Node { node, change: NodeChange::Down { suspicion, settled: None } })
    }

    /// Applies a command.
    pub fn run(&mut self, command: Command) -> Outcome {
        self.propose(command, None)
    }

    /// Applies a command with an idempotency key.
    pub fn propose(&mut self, command: Command, key: Option<super::Key>) -> Outcome {
        self.revision += 1;
        self.state.apply(self.revision, &Proposal { now_ms: self.now_ms, key, command })
    }

    /// Applies a command that answers a VM.
    pub fn vm(&mut self, command: Command) -> VmRecord {
        match self.run(command).unwrap() {
            Answer::Vm { vm, .. } => vm.as_ref().clone(),
            other => panic!("{other:?}"),
        }
    }
}

/// A VM.
pub fn vm() -> VmRecord {
    Cluster::new(16).vm(create(1, "a"))
}
