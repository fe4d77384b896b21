//! openraft's own suite against our stores, and what a crash leaves.

use std::path::Path;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use super::log_store::LogStore;
use super::state_store::StateStore;
use super::types::Types;
use super::*;
use crate::state::testing::{create, image, init, kernel};
use crate::state::{Answer, Command};

struct Builder;

impl StoreBuilder<Types, LogStore, StateStore, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateStore), StorageError<Types>> {
        let folder = TempDir::new().unwrap();
        let (log, _) = LogStore::open(&folder.path().join("log.redb")).unwrap();
        let (state, _) = StateStore::open(&folder.path().join("state.redb")).unwrap();
        Ok((folder, log, state))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stores_pass_the_suite_of_openraft() {
    Suite::test_all(Builder).await.unwrap();
}

fn proposal(command: Command) -> Proposal {
    Proposal { now_ms: 1_795_000_000_000, key: None, command }
}

async fn open(folder: &Path) -> Consensus {
    let opening = Opening { folder, node: 1, founder: true, snapshot_after: 50, tls: None };
    let consensus = Consensus::open(opening).await.unwrap();
    consensus.recovered().await.unwrap();
    consensus
}

async fn begin(consensus: &Consensus) {
    for command in
        [init(16), Command::PutImage(Box::new(image("img"))), Command::PutKernel(Box::new(kernel("default")))]
    {
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
