//! `image`: root file systems of the cluster.

use std::path::Path;

use blixard_api::image::ImageView;
use serde::Serialize;

use crate::Context;
use crate::args::{Format, Image};
use crate::error::CliError;
use crate::list::now_ms;
use crate::output::Table;
use crate::progress::Progress;
use crate::units::{show_age, show_bytes};
use crate::upload;

/// Characters of a digest that a table shows.
const SHORT_DIGEST: usize = 19;

/// `image`.
pub async fn image(context: &Context, command: Image) -> Result<u8, CliError> {
    match command {
        Image::Import { name, source } => import(context, name, &source).await,
        Image::Ls => ls(context).await,
        Image::Rm { names } => {
            each(context, &names, async |name: String| {
                context.client.delete_image(&name).await?;
                Ok(name)
            })
            .await
        }
        Image::Inspect { names } => {
            inspect(context, &names, async |name: String| Ok(context.client.image(&name).await?)).await
        }
    }
}

async fn import(context: &Context, name: Option<String>, source: &Path) -> Result<u8, CliError> {
    let name = name.or_else(|| upload::name_from(source)).ok_or_else(|| CliError::Usage {
        message: format!("no name for an image can be made from {:?}", source.display().to_string()),
        suggestion: "give one with --name".into(),
    })?;
    check_name(&name)?;
    let upload = upload::open(source)?;
    let progress = Progress::start(context.output, &format!("importing {name}"));
    let counter = progress.counter(upload.length());
    let upload = upload.with_progress(move |bytes| counter.set(bytes));
    let view = context.client.import_image(&name, upload).await?;
    progress.finish(&format!("imported {} ({})", view.name, show_bytes(view.size_bytes)));
    done(context, &view, &view.name)
}

/// Refuses a name here, before anything is uploaded.
pub fn check_name(name: &str) -> Result<(), CliError> {
    blixard_api::check_name(name, true).map_err(|possible| CliError::Value {
        message: format!("{name:?} cannot be the name"),
        field: "name",
        possible,
    })
}

/// Prints what was imported.
pub fn done(context: &Context, view: &impl Serialize, name: &str) -> Result<u8, CliError> {
    if context.output.structured() {
        context.output.value(view)?
    } else {
        context.output.line(name)?
    }
    Ok(0)
}

async fn ls(context: &Context) -> Result<u8, CliError> {
    let images = context.client.list_images().await?.items;
    list(context, &images, |i| &i.name, |wide| table(&images, wide, now_ms()))
}

/// Prints a list in the form that is wanted.
pub fn list<T: Serialize>(
    context: &Context,
    items: &[T],
    name: impl Fn(&T) -> &str,
    table: impl FnOnce(bool) -> String,
) -> Result<u8, CliError> {
    let output = context.output;
    if output.structured() {
        output.value(&items)?;
    } else if output.quiet || output.format == Format::Name {
        for item in items {
            output.line(name(item))?;
        }
    } else {
        output.text(&table(output.format == Format::Wide))?;
    }
    Ok(0)
}

/// A digest as short as a table needs it.
pub fn short(digest: &str, wide: bool) -> String {
    if wide { digest.into() } else { digest.chars().take(SHORT_DIGEST).collect() }
}

fn table(images: &[ImageView], wide: bool, now_ms: u64) -> String {
    let mut table = Table::new(&["NAME", "DIGEST", "SIZE", "RUNS", "AGE"]);
    for image in images {
        let config = &image.config;
        let runs: Vec<&str> = config.entrypoint.iter().chain(&config.command).map(String::as_str).collect();
        table.row(vec![
            image.name.clone(),
            short(&image.digest, wide),
            show_bytes(image.size_bytes),
            runs.join(" ").chars().take(if wide { 200 } else { 40 }).collect(),
            show_age(now_ms.saturating_sub(image.created_at_ms)),
        ]);
    }
    table.render()
}

/// Does something with each name, prints the names; the exit code is that of the first error.
pub async fn each(
    context: &Context,
    names: &[String],
    work: impl AsyncFn(String) -> Result<String, CliError>,
) -> Result<u8, CliError> {
    let (mut code, mut done) = (0, vec![]);
    for name in names {
        match work(name.clone()).await {
            Ok(name) => done.push(name),
            Err(error) => {
                context.output.error(&error);
                code = if code == 0 { error.code() } else { code };
            }
        }
    }
    if context.output.structured() {
        context.output.value(&done)?;
    } else {
        for name in &done {
            context.output.line(name)?;
        }
    }
    Ok(code)
}

/// Prints all about each name, as an array; the exit code is that of the first error.
pub async fn inspect<T: Serialize>(
    context: &Context,
    names: &[String],
    get: impl AsyncFn(String) -> Result<T, CliError>,
) -> Result<u8, CliError> {
    let (mut code, mut views) = (0, vec![]);
    for name in names {
        match get(name.clone()).await {
            Ok(view) => views.push(view),
            Err(error) => {
                context.output.error(&error);
                code = if code == 0 { error.code() } else { code };
            }
        }
    }
    context.output.value(&views)?;
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_what_an_image_is_and_runs() {
        let image: ImageView = serde_json::from_value(serde_json::json!({
            "name": "busybox", "digest": "sha256:0123456789abcdef0123", "size_bytes": 2_000_000, "fs": "erofs",
            "created_at_ms": 0, "config": { "entrypoint": ["/bin/sh"], "command": ["-c", "true"] }
        }))
        .unwrap();
        assert_eq!(
            table(&[image], false, 7_200_000),
            "NAME      DIGEST                SIZE      RUNS              AGE\n\
             busybox   sha256:0123456789ab   1.9 MiB   /bin/sh -c true   2h\n"
        );
    }
}
