//! One run: a seed, and all that follows from it.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Once;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::checks::{Checks, missing};
use crate::clients::{Client, Crowd};
use crate::dice::Dice;
use crate::faults::Faults;
use crate::history::History;
use crate::liar::Liar;
use crate::operator::Operator;
use crate::trace::Trace;
use crate::world::World;

/// What a run is like.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// All chance follows from this.
    pub seed: u64,
    /// Nodes at the beginning; absent: 3, now and then 4 or 5.
    pub nodes: Option<usize>,
    /// Steps in which things go wrong, each of 50 to 500 ms.
    pub steps: u64,
    /// Prints what happens.
    pub print: bool,
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The first thing that was wrong.
    pub wrong: Option<String>,
    /// Events, and the number that they make together.
    pub sum: (u64, u64),
    /// Answered requests of clients.
    pub answered: usize,
    /// How often a VM began to run.
    pub begun: u64,
    /// Simulated time.
    pub time: Duration,
}

/// Requests at once.
const CLIENTS: u64 = 4;
/// Longest time until everything is as it shall be, once nothing is wrong any more.
const CONVERGE_MAX: Duration = Duration::from_secs(60);

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A panic within a task would go unnoticed.
fn notice_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANIC.with_borrow_mut(|panic| {
                panic.get_or_insert_with(|| info.to_string());
            });
            before(info);
        }));
    });
}

/// Runs one seed.
///
/// # Errors
/// This host cannot run it.
pub fn run(settings: Settings) -> std::io::Result<Outcome> {
    simulated(settings.seed, async move |folder| simulate(settings, folder).await)
}

/// Runs something in simulated time. It gets a folder of the real host.
///
/// # Errors
/// This host cannot run it.
fn simulated<T>(seed: u64, work: impl AsyncFnOnce(PathBuf) -> T) -> std::io::Result<T> {
    notice_panics();
    PANIC.take();
    blixard_node::raft::runtime::determine(seed);
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    let outcome = runtime.block_on(work(folder.path().to_owned()));
    drop(runtime);
    Ok(outcome)
}

async fn simulate(settings: Settings, folder: PathBuf) -> Outcome {
    let begin = Instant::now();
    let mut dice = Dice::new(settings.seed);
    let trace = Trace::new(settings.print);
    let mut world = World::new(dice.fork(), trace.clone(), folder);
    let mut checks = Checks::default();
    let history = History::default();
    let usual = dice.pick(&[3, 3, 3, 3, 4, 5]).unwrap_or(3);
    let nodes = settings.nodes.unwrap_or(usual);
    if let Err(error) = form(&mut world, nodes).await {
        trace.wrong(format_args!("the cluster is not formed: {error}"));
    }
    let mut faults = Faults::new(dice.fork());
    let mut operator = Operator::new(settings.seed);
    let mut liar = Liar::new(settings.seed);
    let mut crowd = Crowd::new(settings.seed);
    trace.note(format_args!("{nodes} nodes, faults {:?}", faults.kinds()));
    let stop = CancellationToken::new();
    let mut clients = tokio::task::JoinSet::new();
    let mut client = |number, dice| Client {
        number,
        crowd: crowd.as_mut().map(Crowd::fork),
        running: world.running.clone(),
        history: history.clone(),
        trace: trace.clone(),
        dice,
        keys: 0,
    };
    for number in 1..=CLIENTS {
        clients.spawn(client(number, dice.fork()).run(stop.clone()));
    }
    let reader = client(0, dice.fork());
    for _ in 0..settings.steps {
        let until = Instant::now() + dice.millis(50..=500);
        // What is to be repaired within the step is repaired in time.
        while let Some(at) = faults.next_repair().filter(|at| *at < until) {
            tokio::time::sleep_until(at).await;
            faults.repair_due(&mut world);
        }
        tokio::time::sleep_until(until).await;
        look(&mut checks, &world, &trace);
        if trace.found().is_some() {
            break;
        }
        faults.repair_due(&mut world);
        world.supervise().await;
        faults.strike(&mut world).await;
        operator.act(&mut world).await;
        liar.act(&world);
    }
    if trace.found().is_none() {
        faults.end(&mut world);
        stop.cancel();
        while clients.join_next().await.is_some() {}
        converge(&mut world, &mut operator, &mut checks, &trace).await;
    }
    let mut answered = 0;
    if trace.found().is_none() {
        reader.read_all().await;
        let (wrong, count) = history.judge();
        answered = count;
        wrong.into_iter().for_each(|text| trace.wrong(text));
    }
    let begun = world.census.begun();
    Outcome { wrong: trace.found(), sum: trace.sum(), answered, begun, time: begin.elapsed() }
}

/// Makes the cluster with all its nodes.
///
/// # Errors
/// Why not.
async fn form(world: &mut World, nodes: usize) -> Result<(), String> {
    world.found().await?;
    for _ in 1..nodes {
        world.join().await?;
    }
    world.formed().await;
    Ok(())
}

/// Forms a cluster whose nodes come all at once: what it costs to form a large one otherwise grows with the cube of its size,
/// since each node is told of each one that joins, with the list of all.
///
/// # Errors
/// Why not.
async fn form_at_once(world: &mut World, nodes: usize) -> Result<(), String> {
    world.found().await?;
    let mut admitted = Vec::new();
    for _ in 1..nodes {
        admitted.push(world.admit().await?);
    }
    for node in admitted {
        world.start(node, false).await;
    }
    world.formed().await;
    Ok(())
}

/// Lets something happen in a cluster of this many nodes in which nothing else goes wrong.
///
/// # Errors
/// What was wrong.
pub fn scene<T>(
    seed: u64,
    nodes: usize,
    work: impl AsyncFnOnce(&mut World) -> Result<T, String>,
) -> Result<T, String> {
    simulated(seed, async move |folder| {
        let (mut dice, trace) = (Dice::new(seed), Trace::new(false));
        let mut world = World::new(dice.fork(), trace.clone(), folder);
        form_at_once(&mut world, nodes).await?;
        let result = work(&mut world).await;
        trace.found().map_or(result, Err)
    })
    .map_err(|error| error.to_string())?
}

fn look(checks: &mut Checks, world: &World, trace: &Trace) {
    checks.look(world);
    if let Some(panic) = PANIC.take() {
        trace.wrong(panic);
    }
}

async fn converge(world: &mut World, operator: &mut Operator, checks: &mut Checks, trace: &Trace) {
    let until = Instant::now() + CONVERGE_MAX;
    for place in world.places.values() {
        place.machine.host.calm();
    }
    trace.note("nothing goes wrong any more");
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        world.supervise().await;
        look(checks, world, trace);
        if trace.found().is_some() {
            return;
        }
        let tidy = operator.tidy(world).await;
        let missing = if tidy { missing(world) } else { Some("nodes are not to be used".into()) };
        let Some(missing) = missing else { return trace.note("all is as it shall be") };
        if Instant::now() > until {
            return trace.wrong(format_args!("it does not come to rest: {missing}"));
        }
    }
}
