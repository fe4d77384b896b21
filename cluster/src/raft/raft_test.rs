//! openraft's own suite against our stores, and what a crash leaves.

use std::path::Path;

use openraft::storage::RaftStateMachine;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, StorageError};
use tempfile::TempDir;

use super::log_store::LogStore;
use super::state_store::StateStore;
use super::storage::Folder;
use super::types::Types;
use super::*;
use crate::state::testing::{create, image, init, kernel, tell};
use crate::state::{Answer, Command, MemberCommand, Proposal};

struct Builder;

impl StoreBuilder<Types, LogStore, StateStore, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateStore), StorageError<Types>> {
        let folder = TempDir::new().unwrap();
        let (log, _) = LogStore::open(&Folder::new(folder.path())).unwrap();
        let (state, _) = StateStore::open(&Folder::new(folder.path()), Clock::default()).unwrap();
        Ok((folder, log, state))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stores_pass_the_suite_of_openraft() {
    Suite::test_all(Builder).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_change_is_on_the_disk_after_a_while_although_nothing_comes_after_it() {
    let folder = TempDir::new().unwrap();
    let storage = Folder::new(folder.path());
    let (mut state, closed) = StateStore::open(&storage, Clock::default()).unwrap();
    let log_id = types::LogId::new(types::LeaderId { term: 1, node_id: 1 }.to_committed(), 1);
    let command = types::Command::new(proposal(init(16))).unwrap();
    let entry = types::Entry { log_id, payload: EntryPayload::Normal(command) };
    state.apply(futures::stream::iter([Ok((entry, None))])).await.unwrap();
    let before = state.replica().state().clone();
    // The clock of the test goes on at once.
    tokio::time::sleep(Duration::from_secs(2)).await;
    drop(state);
    closed.wait().await;
    let (mut state, _) = StateStore::open(&storage, Clock::default()).unwrap();
    assert_eq!(state.applied_state().await.unwrap().0, Some(log_id));
    assert_eq!(state.replica().state().cluster(), before.cluster());
}

fn proposal(command: Command) -> Proposal {
    Proposal { now_ms: 1_795_000_000_000, key: None, command }
}

fn opening(storage: &Folder) -> Opening<'_> {
    let (clock, election_timeout_ms) = (Clock::default(), ELECTION_TIMEOUT_MS);
    Opening { storage, node: 1, founder: true, snapshot_after: 50, election_timeout_ms, way: None, clock }
}

async fn open(folder: &Path) -> Consensus {
    let storage = Folder::new(folder);
    let consensus = Consensus::open(opening(&storage)).await.unwrap();
    consensus.recovered().await.unwrap();
    consensus
}

async fn begin(consensus: &Consensus) {
    for command in [
        init(16),
        tell(1),
        Command::PutImage(Box::new(image("img"))),
        Command::PutKernel(Box::new(kernel("default"))),
    ] {
        consensus.propose(proposal(command)).await.unwrap().1.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_there_after_a_restart_also_when_the_log_was_cut() {
    let folder = TempDir::new().unwrap();
    let consensus = open(folder.path()).await;
    begin(&consensus).await;
    let mut last = 0;
    for n in 1..=120 {
        let (revision, outcome) = consensus.propose(proposal(create(n, &format!("vm{n}")))).await.unwrap();
        assert!(matches!(outcome, Ok(Answer::Vm { created: true, .. })));
        last = revision;
    }
    // Cutting the log happens behind the answers; it is waited for by what it leaves.
    while consensus.numbers().purged == 0 {
        tokio::task::yield_now().await;
    }
    let before = consensus.replica().state().clone();
    consensus.shutdown().await;

    let consensus = open(folder.path()).await;
    let after = consensus.replica().state().clone();
    assert!(after.revision() >= last);
    assert_eq!(after.vm_count(), 120);
    for vm in before.vms() {
        assert_eq!(after.vm(vm.id), Some(vm));
    }
    consensus.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_proposals_share_flushes_and_each_gets_its_own_answer() {
    let folder = TempDir::new().unwrap();
    let consensus = open(folder.path()).await;
    begin(&consensus).await;
    let proposals = (1..=200u128).map(|n| {
        let consensus = consensus.clone();
        tokio::spawn(async move {
            let answer = consensus.propose(proposal(create(n, &format!("vm{n}")))).await.unwrap().1.unwrap();
            match answer {
                Answer::Vm { vm, created: true } => vm.name.clone(),
                other => panic!("{other:?}"),
            }
        })
    });
    let names: Vec<String> = futures::future::try_join_all(proposals).await.unwrap();
    let expected: Vec<String> = (1..=200).map(|n| format!("vm{n}")).collect();
    assert_eq!(names, expected);
    consensus.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_cluster_has_a_feature_level_that_it_does_not_know_stops_and_says_why_also_when_it_is_started_again()
 {
    let folder = TempDir::new().unwrap();
    let consensus = open(folder.path()).await;
    begin(&consensus).await;
    let level = crate::node::feature_level() + 1;
    // Another program on this node, which knew more, has said so before this one was installed.
    let raise = MemberCommand::RaiseLevel { level, node: 1, knows: level };
    let answer = consensus.propose(proposal(Command::Member(Box::new(raise)))).await;
    assert!(answer.is_err(), "{answer:?}");
    let why = format!("the cluster has feature level {level}, this program knows up to {}", level - 1);
    let stopped = consensus.stopped().await;
    assert!(stopped.contains(&why), "{stopped}");
    consensus.shutdown().await;

    let storage = Folder::new(folder.path());
    let text = match Consensus::open(opening(&storage)).await {
        Ok(again) => again.stopped().await,
        Err(error) => crate::host::chain(&error),
    };
    assert!(text.contains(&why), "{text}");
}

/// A log file as programs wrote it whose schema version was 1: entries as JSON.
fn write_version_1(path: &Path, entries: &[types::Entry]) {
    use redb::TableDefinition;
    const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
    const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
    let db = redb::Database::create(path).unwrap();
    let transaction = db.begin_write().unwrap();
    {
        let mut log = transaction.open_table(LOG).unwrap();
        for entry in entries {
            let json = serde_json::to_vec(entry).unwrap();
            log.insert(entry.log_id.index, json.as_slice()).unwrap();
        }
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert("schema", 1_u32.to_le_bytes().as_slice()).unwrap();
    }
    transaction.commit().unwrap();
}

fn entry(index: u64, payload: openraft::EntryPayload<types::Command, u64, BasicNode>) -> types::Entry {
    use openraft::vote::RaftLeaderId;
    let leader = types::LeaderId { term: 1, node_id: 1 }.to_committed();
    types::Entry { log_id: openraft::LogId::new(leader, index), payload }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_the_former_schema_is_brought_to_the_present_one() {
    use openraft::EntryPayload;
    use openraft::storage::RaftLogReader;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("log.redb");
    let command = types::Command::new(proposal(Command::PutImage(Box::new(image("img"))))).unwrap();
    let members = openraft::Membership::new_with_defaults(vec![[1].into()], []);
    let entries = [
        entry(0, EntryPayload::Membership(members)),
        entry(1, EntryPayload::Blank),
        entry(2, EntryPayload::Normal(command)),
    ];
    write_version_1(&path, &entries);
    for _ in 0..2 {
        let (mut log, closed) = LogStore::open(&Folder::new(folder.path())).unwrap();
        assert_eq!(log.try_get_log_entries(..).await.unwrap(), entries);
        drop(log);
        closed.wait().await;
    }
}

#[test]
fn a_log_of_a_later_schema_is_left_alone() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("log.redb");
    let db = redb::Database::create(&path).unwrap();
    let transaction = db.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
    transaction.open_table(meta).unwrap().insert("schema", 99_u32.to_le_bytes().as_slice()).unwrap();
    transaction.commit().unwrap();
    drop(db);
    assert!(matches!(LogStore::open(&Folder::new(folder.path())), Err(LogError::Newer { found: 99 })));
}

/// A disk in memory that fails when told to.
#[derive(Debug, Clone)]
struct BadDisk {
    memory: Arc<redb::backends::InMemoryBackend>,
    broken: Arc<std::sync::atomic::AtomicBool>,
}

impl BadDisk {
    fn check(&self) -> std::io::Result<()> {
        match self.broken.load(Ordering::SeqCst) {
            true => Err(std::io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl storage::Storage for BadDisk {
    fn open(&self, _: &str, _: usize) -> Result<redb::Database, redb::DatabaseError> {
        redb::Database::builder().create_with_backend(self.clone())
    }

    fn journal(&self) -> std::io::Result<(Box<dyn redb::StorageBackend>, usize)> {
        let memory = Arc::default();
        Ok((Box::new(Self { memory, broken: Arc::clone(&self.broken) }), 1 << 16))
    }

    fn run(&self, writer: log_store::Writer) -> std::io::Result<()> {
        std::thread::spawn(move || writer.run());
        Ok(())
    }
}

impl redb::StorageBackend for BadDisk {
    fn len(&self) -> std::io::Result<u64> {
        self.memory.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.memory.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.check()?;
        self.memory.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.check()?;
        self.memory.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.check()?;
        self.memory.write(offset, data)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_counts_as_stored_when_the_disk_is_full() {
    use openraft::EntryPayload;
    use openraft::storage::{IOFlushed, RaftLogStorage};
    use openraft::type_config::TypeConfigExt;
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let disk = BadDisk { memory: Arc::default(), broken: Arc::clone(&broken) };
    let (mut log, _) = LogStore::open(&disk).unwrap();
    let mut append = async |index| {
        let (done, flushed) = Types::oneshot();
        log.append([entry(index, EntryPayload::Blank)], IOFlushed::signal(done)).await.unwrap();
        flushed.await.unwrap()
    };
    append(0).await.unwrap();
    broken.store(true, Ordering::SeqCst);
    assert!(append(1).await.is_err());
}
