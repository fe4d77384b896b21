//! How long the VMs of a dead host are missed: from the loss of its power until each of them runs elsewhere, in simulated time.
//! Nothing else goes wrong.

use std::time::Duration;

use blixard_api::VmId;
use blixard_api::vm::VmSpec;
use blixard_node::state::{Command, NodeId};
use tokio::time::Instant;

use crate::run::scene;
use crate::world::{IMAGE, World};

/// VMs of the host.
const VMS: u128 = 3;
/// They have to run, there or elsewhere, after this time.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How often it is looked: the measured times are up to this much too long.
const LOOK: Duration = Duration::from_millis(20);

/// Lets a host die in a cluster of this many nodes, the leader's or another. Answers how long its VMs were missed.
///
/// # Errors
/// What was wrong.
pub fn run(seed: u64, nodes: usize, leader: bool) -> Result<Duration, String> {
    scene(seed, nodes, async |world| measure(world, leader).await)
}

async fn measure(world: &mut World, leader: bool) -> Result<Duration, String> {
    let some = world.some().ok_or("no node runs")?.consensus;
    let leads = some.leader_id().ok_or("nobody leads")?;
    let mut others = world.places.keys().copied().filter(|node| *node != leads);
    let dies = if leader { leads } else { others.next_back().ok_or("there is no other node")? };
    for number in 0..VMS {
        create(world, number, dies).await?;
    }
    running(world, |node| node == dies).await?;
    // A node whose agent has just come is known to have leases a moment later; before, nothing may be moved from it.
    let until = Instant::now() + WAIT_MAX;
    while !some.replica().state().nodes().all(|node| node.offer.leased) {
        if Instant::now() > until {
            return Err("not all nodes are known to have leases".into());
        }
        tokio::time::sleep(LOOK).await;
    }
    world.kill(dies, true, Duration::from_secs(3600));
    let begin = Instant::now();
    running(world, |node| node != dies).await?;
    Ok(begin.elapsed())
}

async fn create(world: &World, number: u128, node: NodeId) -> Result<(), String> {
    let spec = serde_json::json!({
        "image": IMAGE,
        "memory_mib": 256,
        "placement": { "on_node_loss": "restart" },
    });
    let spec: VmSpec = serde_json::from_value(spec).map_err(|error| error.to_string())?;
    let command = Command::CreateVm {
        id: VmId::from_parts(1_795_000_000_000, number),
        project: "default".into(),
        name: format!("vm-{number}"),
        spec: Box::new(spec),
        node,
        waits: false,
    };
    world.propose(command).await.map(drop)
}

/// Waits until all VMs run on hosts like these.
async fn running(world: &World, wanted: impl Fn(NodeId) -> bool) -> Result<(), String> {
    let until = Instant::now() + WAIT_MAX;
    loop {
        let places = world.places.iter().filter(|(node, place)| place.powered && wanted(**node));
        let count: usize = places.map(|(_, place)| place.machine.host.running().len()).sum();
        if u128::try_from(count) == Ok(VMS) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("{count} of {VMS} VMs run"));
        }
        tokio::time::sleep(LOOK).await;
    }
}
