//! The log against a model, through ends in good order and crashes.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::vote::{RaftLeaderId, RaftVote};
use proptest::prelude::*;
use redb::{Database, StorageBackend};
use tempfile::TempDir;

use super::super::types::{Command, LeaderId};
use super::*;
use crate::raft::storage::Folder;

/// A folder with a journal that is full after some entries.
struct Small(Folder);

impl Storage for Small {
    fn open(&self, name: &str, cache_bytes: usize) -> Result<Database, redb::DatabaseError> {
        self.0.open(name, cache_bytes)
    }

    fn journal(&self) -> io::Result<(Box<dyn StorageBackend>, usize)> {
        Ok((self.0.journal()?.0, 4096))
    }

    fn run(&self, writer: Writer) -> io::Result<()> {
        self.0.run(writer)
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// That many entries with that many bytes.
    Append(u64, usize),
    /// The last entries go, that many.
    Truncate(u64),
    /// All but the last entries go, all but that many.
    Purge(u64),
    Vote,
    /// The process ends in good order and starts again.
    Restart,
    /// The process ends at once, and another starts with what is on the disk.
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1..6_u64, 0..3000_usize).prop_map(|(count, bytes)| Step::Append(count, bytes)),
        2 => (1..4_u64).prop_map(Step::Truncate),
        1 => (0..6_u64).prop_map(Step::Purge),
        1 => Just(Step::Vote),
        1 => Just(Step::Restart),
        2 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..40)
}

fn copy(from: &Path) -> TempDir {
    let to = TempDir::new().unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.path().join(file.file_name())).unwrap();
    }
    to
}

async fn compare(
    log: &mut LogStore,
    model: &BTreeMap<u64, Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
) {
    let expected: Vec<Entry> = model.values().cloned().collect();
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), expected);
    let state = log.get_log_state().await.unwrap();
    assert_eq!(state.last_log_id, expected.last().map(RaftEntry::log_id).or(purged));
    assert_eq!(state.last_purged_log_id, purged);
    assert_eq!(log.read_vote().await.unwrap(), vote);
}

async fn check(steps: Vec<Step>) {
    let mut folder = TempDir::new().unwrap();
    let open = |folder: &TempDir| LogStore::open(&Small(Folder::new(folder.path()))).unwrap();
    let (mut log, mut closed) = open(&folder);
    let (mut model, mut next, mut term) = (BTreeMap::<u64, Entry>::new(), 0_u64, 1_u64);
    let (mut purged, mut vote) = (None, None);
    for step in steps {
        match step {
            Step::Append(count, bytes) => {
                let entries: Vec<Entry> = (next..next + count)
                    .map(|index| {
                        let id = LogId::new(LeaderId { term, node_id: 1 }.to_committed(), index);
                        let command = Command::from_bytes(&vec![u8::try_from(index % 256).unwrap(); bytes]);
                        Entry { log_id: id, payload: EntryPayload::Normal(command) }
                    })
                    .collect();
                next += count;
                model.extend(entries.iter().map(|entry| (entry.log_id.index, entry.clone())));
                let (done, flushed) = Types::oneshot();
                log.append(entries, IOFlushed::signal(done)).await.unwrap();
                flushed.await.unwrap().unwrap();
            }
            Step::Truncate(count) => {
                let first = purged.map_or(0, |id: LogId| id.index + 1);
                next = next.saturating_sub(count).max(first);
                model.split_off(&next);
                term += 1;
                let last = model.last_key_value().map(|(_, entry)| entry.log_id()).or(purged);
                log.truncate_after(last).await.unwrap();
            }
            Step::Purge(keep) => {
                let Some(upto) = next.checked_sub(keep + 1).filter(|upto| model.contains_key(upto)) else {
                    continue;
                };
                purged = model.get(&upto).map(RaftEntry::log_id);
                model = model.split_off(&(upto + 1));
                log.purge(purged.unwrap()).await.unwrap();
            }
            Step::Vote => {
                term += 1;
                vote = Some(Vote::from_leader_id(LeaderId { term, node_id: 2 }, false));
                log.save_vote(&vote.unwrap()).await.unwrap();
            }
            Step::Restart => {
                drop(log);
                closed.wait().await;
                (log, closed) = open(&folder);
            }
            Step::Crash => {
                let crashed = copy(folder.path());
                drop(log);
                closed.wait().await;
                folder = crashed;
                (log, closed) = open(&folder);
            }
        }
        compare(&mut log, &model, purged, vote).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn the_log_is_what_was_flushed_after_any_steps_ends_and_crashes(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(check(steps));
    }
}
