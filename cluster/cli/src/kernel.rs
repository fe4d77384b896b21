//! `kernel`: guest kernels of the cluster.

use std::io;
use std::path::{Path, PathBuf};

use blixard_api::Client;
use blixard_api::client::Upload;
use blixard_api::image::KernelView;
use blixard_images::kernel::{collect_kernel, write_kernel_bundle};

use crate::Context;
use crate::args::Kernel;
use crate::error::CliError;
use crate::image::{check_name, done, each, inspect, list, short};
use crate::list::now_ms;
use crate::output::{Output, Table};
use crate::progress::Progress;
use crate::units::{show_age, show_bytes};
use crate::upload;

/// `kernel`.
pub async fn kernel(context: &Context, command: Kernel) -> Result<u8, CliError> {
    match command {
        Kernel::Import { kernel, modules, release, name } => {
            let source = match (kernel, modules, release) {
                (Some(kernel), Some(modules), _) => Source::Files(kernel, modules),
                (_, _, Some(release)) => Source::Release(release),
                _ => Source::Host,
            };
            let view = import(&context.client, context.output, &name, source).await?;
            done(context, &view, &view.name)
        }
        Kernel::Ls => {
            let kernels = context.client.list_kernels().await?.items;
            list(context, &kernels, |k| &k.name, |wide| table(&kernels, wide, now_ms()))
        }
        Kernel::Rm { names } => {
            each(context, &names, async |name: String| {
                context.client.delete_kernel(&name).await?;
                Ok(name)
            })
            .await
        }
        Kernel::Inspect { names } => {
            inspect(context, &names, async |name: String| Ok(context.client.kernel(&name).await?)).await
        }
    }
}

/// The name of the kernel of VMs that name none.
pub const DEFAULT: &str = "default";

/// Which kernel is imported.
pub enum Source {
    /// The one this host runs.
    Host,
    /// One that is installed on this host.
    Release(String),
    /// A file and its modules.
    Files(PathBuf, PathBuf),
}

fn table(kernels: &[KernelView], wide: bool, now_ms: u64) -> String {
    let mut table = Table::new(&["NAME", "RELEASE", "DIGEST", "SIZE", "MODULES", "AGE"]);
    for kernel in kernels {
        table.row(vec![
            kernel.name.clone(),
            kernel.release.clone(),
            short(&kernel.digest, wide),
            show_bytes(kernel.size_bytes),
            if wide { kernel.modules.join(",") } else { kernel.modules.len().to_string() },
            show_age(now_ms.saturating_sub(kernel.created_at_ms)),
        ]);
    }
    table.render()
}

/// Imports a kernel under a name.
pub async fn import(
    client: &Client,
    output: Output,
    name: &str,
    source: Source,
) -> Result<KernelView, CliError> {
    check_name(name)?;
    let progress = Progress::start(output, &format!("importing kernel {name}"));
    let upload = bundle(source).await?;
    let counter = progress.counter(upload.length());
    let upload = upload.with_progress(move |bytes| counter.set(bytes));
    let view = client.import_kernel(name, upload).await?;
    progress.finish(&format!("imported kernel {} ({})", view.release, show_bytes(view.size_bytes)));
    Ok(view)
}

/// The kernel of a release as it is installed on this host.
fn installed(release: &str) -> (PathBuf, PathBuf) {
    let modules = Path::new("/lib/modules").join(release);
    // Debian and Fedora install the kernel in /boot, others beside its modules.
    let candidates = [Path::new("/boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
    let [boot, _] = &candidates;
    let kernel = candidates.iter().find(|path| path.exists()).unwrap_or(boot).clone();
    (kernel, modules)
}

/// The upload of a kernel with the modules that guests need.
async fn bundle(source: Source) -> Result<Upload, CliError> {
    let (kernel, modules) = match source {
        Source::Files(kernel, modules) => (kernel, modules),
        Source::Release(release) => installed(&release),
        Source::Host => {
            let file = "/proc/sys/kernel/osrelease";
            let release = std::fs::read_to_string(file)
                .map_err(|e| CliError::local(format!("cannot read {file}"), e))?;
            installed(release.trim())
        }
    };
    let collected = tokio::task::spawn_blocking(move || collect_kernel(&kernel, &modules)).await;
    let files =
        collected.map_err(|e| CliError::local("cannot collect the kernel", io::Error::other(e)))??;
    Ok(upload::produced(move |out| write_kernel_bundle(&files, out)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_release_and_number_of_modules() {
        let kernel: KernelView = serde_json::from_value(serde_json::json!({
            "name": "default", "release": "6.1.0-1-cloud-amd64", "digest": "sha256:0123456789abcdef",
            "initramfs_digest": "sha256:00", "size_bytes": 20 << 20, "modules": ["ext4", "erofs"], "created_at_ms": 0
        }))
        .unwrap();
        assert_eq!(
            table(&[kernel], false, 5000),
            "NAME      RELEASE               DIGEST                SIZE     MODULES   AGE\n\
             default   6.1.0-1-cloud-amd64   sha256:0123456789ab   20 MiB   2         5s\n"
        );
    }

    #[tokio::test]
    async fn what_is_no_kernel_is_refused_before_anything_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vmlinuz");
        std::fs::write(&file, [7; 100_000]).unwrap();
        let refused = bundle(Source::Files(file, folder.path().into())).await.err().unwrap();
        assert!(refused.to_text().contains("vmlinuz"), "{}", refused.to_text());
        assert_eq!(refused.code(), 1);
        let missing = bundle(Source::Release("no-such-release".into())).await.err().unwrap();
        assert_eq!(missing.code(), 3, "{}", missing.to_text());
    }
}
