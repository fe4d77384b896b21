//! Leadership that shall move to a voter which the leader cannot reach: the third one is elected, and hands over in turn.

use std::time::Duration;

use crate::run::scene;
use crate::world::World;

/// The request may take this long: the election of the third voter, and one more.
const TIME: Duration = Duration::from_secs(5);

/// Runs it. Answers whether there were two elections: the one that is meant may win at once.
///
/// # Errors
/// What was wrong.
pub fn run(seed: u64) -> Result<bool, String> {
    scene(seed, 3, async |world| transfer(world).await)
}

async fn transfer(world: &World) -> Result<bool, String> {
    let some = world.some().ok_or("no node runs")?.consensus;
    let leads = some.leader_id().ok_or("nobody leads")?;
    let mut others = world.places.keys().copied().filter(|node| *node != leads);
    let (to, third) = others.next().zip(others.next()).ok_or("there are no two others")?;
    let third = world.running.get(third).ok_or("a node does not run")?.consensus;
    let term = third.numbers().term;
    world.network.cut(leads, to, true);
    third.transfer(to, TIME).await.map_err(|reason| format!("not handed over: {reason}"))?;
    if third.leader_id() != Some(to) {
        return Err("another leads".into());
    }
    Ok(third.numbers().term > term + 1)
}
