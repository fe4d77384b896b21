//! Whether log and state age: `cycles FOLDER CYCLES CLIENTS` makes and forgets VMs in consensus of one voter, with real files and
//! flushes, as default settings have it. Each cycle is three commands: create, delete, forget. Prints one JSON object for each
//! tenth: how long commands took until they were applied, and how large files and memory are.
#![expect(clippy::print_stdout, reason = "a program for the terminal")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use blixard_agent_api::{BlobRef, Digest};
use blixard_api::VmId;
use blixard_api::vm::VmSpec;
use blixard_netd_api::Subnet;
use blixard_node::clock::Clock;
use blixard_node::node::feature_level;
use blixard_node::raft::storage::Folder;
use blixard_node::raft::{Consensus, ELECTION_TIMEOUT_MS, Opening};
use blixard_node::state::placement::NodeChange;
use blixard_node::state::records::LEASE_MS;
use blixard_node::state::{Capacity, Command, ImageRecord, KernelRecord, NetworkRecord, Proposal};

/// Windows that are reported.
const PARTS: u64 = 10;
/// Entries after which the log is cut: the default of the node.
const SNAPSHOT_AFTER: u64 = 1000;

fn blob(number: u8) -> BlobRef {
    BlobRef { digest: Digest::from_bytes([number; 32]), size_bytes: 1 }
}

fn setup() -> Result<Vec<Command>> {
    let network = NetworkRecord {
        name: "default".into(),
        v4: Subnet { gateway: "10.88.0.1".parse()?, prefix: 16 },
        v6: Subnet { gateway: "fd62:1::1".parse()?, prefix: 64 },
        nat: true,
        mtu: 1500,
        next_host: 2,
    };
    let image = ImageRecord {
        name: "img".into(),
        blob: blob(1),
        fs: "erofs".into(),
        created_at_ms: 1,
        config: serde_json::from_str(r#"{"command":["/bin/sh"]}"#)?,
    };
    let kernel = KernelRecord {
        name: "default".into(),
        release: "6.1.0".into(),
        kernel: blob(2),
        initramfs: blob(3),
        modules: vec![],
        created_at_ms: 1,
    };
    let capacity =
        Capacity { cpus: 1 << 20, memory_mib: 1 << 40, disk_mib: 1 << 40, arch: Default::default() };
    Ok(vec![
        Command::InitCluster {
            feature_level: feature_level(),
            network,
            node: 1,
            node_name: "n1".into(),
            lease_ms: LEASE_MS,
        },
        Command::Node { node: 1, change: NodeChange::Capacity(capacity) },
        Command::PutImage(Box::new(image)),
        Command::PutKernel(Box::new(kernel)),
    ])
}

async fn timed(consensus: &Consensus, command: Command, times: &mut Vec<u64>) -> Result<()> {
    let begin = Instant::now();
    let proposal = Proposal { now_ms: consensus.clock().now_ms(), key: None, command };
    consensus.propose(proposal).await?.1?;
    times.push(u64::try_from(begin.elapsed().as_micros())?);
    Ok(())
}

async fn client(consensus: Consensus, next: Arc<AtomicU64>, end: u64) -> Result<Vec<u64>> {
    let mut times = Vec::new();
    let spec: VmSpec = serde_json::from_str(r#"{"image":"img"}"#)?;
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= end {
            return Ok(times);
        }
        let id = VmId::from_parts(1_795_000_000_000 + number, number.into());
        let (project, name) = ("default".to_owned(), format!("vm-{number}"));
        let spec = Box::new(spec.clone());
        timed(&consensus, Command::CreateVm { id, project, name, spec, node: 1, waits: false }, &mut times)
            .await?;
        timed(&consensus, Command::DeleteVm { id, force: true, if_generation: None }, &mut times).await?;
        timed(&consensus, Command::ForgetVm { id, epoch: 1 }, &mut times).await?;
    }
}

fn bytes(folder: &Path, name: &str) -> Result<u64> {
    Ok(std::fs::metadata(folder.join(name)).with_context(|| format!("{name} is not there"))?.len())
}

/// Memory of this process in KiB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, cycles, clients] = arguments.as_slice() else { bail!("cycles FOLDER CYCLES CLIENTS") };
    let (folder, cycles, clients): (PathBuf, u64, u64) = (folder.into(), cycles.parse()?, clients.parse()?);
    let (storage, clock) = (Folder::make(&folder)?, Clock::default());
    let opening = Opening {
        storage: &storage,
        node: 1,
        founder: true,
        snapshot_after: SNAPSHOT_AFTER,
        election_timeout_ms: ELECTION_TIMEOUT_MS,
        way: None,
        clock,
    };
    let consensus = Consensus::open(opening).await?;
    consensus.recovered().await?;
    for command in setup()? {
        timed(&consensus, command, &mut Vec::new()).await?;
    }
    let next = Arc::new(AtomicU64::new(0));
    for part in 1..=PARTS {
        let begin = Instant::now();
        next.store(cycles * (part - 1) / PARTS, Ordering::Relaxed);
        let end = cycles * part / PARTS;
        let tasks: Vec<_> =
            (0..clients).map(|_| tokio::spawn(client(consensus.clone(), Arc::clone(&next), end))).collect();
        let mut times = Vec::new();
        for task in tasks {
            times.extend(task.await??);
        }
        times.sort_unstable();
        let at =
            |per_mille: usize| times.get((times.len() * per_mille / 1000).min(times.len().saturating_sub(1)));
        let row = serde_json::json!({
            "cycles": end, "seconds": begin.elapsed().as_secs_f64(), "p50_us": at(500), "p99_us": at(990),
            "p999_us": at(999), "max_us": times.last(), "log_bytes": bytes(&folder, "log.redb")?,
            "state_bytes": bytes(&folder, "state.redb")?, "memory_kib": memory(),
        });
        println!("{row}");
    }
    consensus.shutdown().await;
    Ok(())
}
