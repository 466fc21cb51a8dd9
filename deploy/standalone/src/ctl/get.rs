//! `get`: lists things, once or for as long as somebody watches.

use baton_process::one_line;
use clap::ValueEnum;

use super::{
    coordinators,
    error::CtlError,
    events,
    fleet::Fleet,
    groups, instances, links,
    output::{Column, Output, Table},
    requests, roles,
    select::Selector,
    watch::{EVERY, Printer, Watched},
    words::now_unix_millis,
};
use crate::screen::{complain, say};

#[derive(Debug, Clone, clap::Args)]
pub(super) struct GetArgs {
    #[arg(value_enum)]
    what: What,

    /// Only these: instances, groups, coordinators, requests by their names; roles, links and events by those of their
    /// instances (events by group too).
    #[arg(value_name = "NAME")]
    names: Vec<String>,

    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,

    /// Only instances with these labels: key=value, key!=value, key, !key, with commas between.
    #[arg(short = 'l', long, value_name = "LABELS")]
    selector: Option<Selector>,

    /// Without the line of headers.
    #[arg(long)]
    no_headers: bool,

    /// Go on, and print what changes. Events come as they happen, the rest is looked at each second.
    #[arg(short, long)]
    watch: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// What is registered, and how busy it is.
    #[value(aliases = ["instance", "inst"])]
    Instances,
    /// What every instance should be beside what it is.
    #[value(alias = "role")]
    Roles,
    /// What the coordinators carry.
    #[value(aliases = ["request", "req"])]
    Requests,
    /// Who takes clients' requests.
    #[value(aliases = ["coordinator", "coord"])]
    Coordinators,
    /// How KV caches travel between instances.
    #[value(alias = "link")]
    Links,
    /// What has happened.
    #[value(aliases = ["event", "ev"])]
    Events,
    /// By what each group is divided, and how far it is from its plan.
    #[value(alias = "group")]
    Groups,
}

pub(super) async fn run(args: GetArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    if args.selector.is_some() && args.what != What::Instances {
        return Err(CtlError::Usage("-l selects instances: only they have labels"));
    }
    if !args.watch {
        let table = list(&args, fleet).await?;
        // Events are not called by a name: an instance has had several, or none.
        let table = if args.what == What::Events { table } else { table.only(&args.names)? };
        let single = args.names.len() == 1 && !matches!(args.what, What::Events | What::Links);
        let text = table.text(args.output, !args.no_headers, single);
        if table.rows.is_empty() && matches!(args.output, Output::Table | Output::Wide) {
            // Scripts that count lines count none.
            complain(&text);
        } else {
            say(&text);
        }
        return Ok(());
    }
    if args.what == What::Events {
        let mut printer = printer(&args, events::table(&[]).columns);
        return events::follow(fleet, &args.names, &mut printer).await;
    }
    watch(&args, fleet).await
}

/// Only the first look may fail; later ones are repeated.
async fn watch(args: &GetArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let mut table = list(args, fleet).await?.only(&args.names)?;
    let (mut printer, mut watched) = (printer(args, table.columns), Watched::default());
    let mut failing = false;
    loop {
        if !printer.print(&watched.changes(&table)) {
            return Ok(());
        }
        table = loop {
            tokio::time::sleep(EVERY).await;
            match list(args, fleet).await {
                Ok(table) => break table,
                Err(error) if !failing => {
                    failing = true;
                    complain(&format!("{}; asking again", one_line(&error)));
                }
                Err(_) => {}
            }
        };
        failing = false;
        // One that is gone is no error any more, but something to be told.
        table
            .rows
            .retain(|row| args.names.is_empty() || row.names.iter().any(|name| args.names.contains(name)));
    }
}

fn printer(args: &GetArgs, columns: &'static [Column]) -> Printer {
    Printer::new(columns, args.output, !args.no_headers)
}

async fn list(args: &GetArgs, fleet: &mut Fleet) -> Result<Table, CtlError> {
    Ok(match args.what {
        What::Instances => {
            let mut found = fleet.instances().await?;
            found.retain(|instance| {
                args.selector.as_ref().is_none_or(|selector| selector.holds_for(instance))
            });
            instances::table(found, now_unix_millis())
        }
        What::Roles => roles::table(fleet.roles().await?),
        What::Requests => requests::list(fleet).await?,
        What::Coordinators => coordinators::table(fleet.coordinators().await?, now_unix_millis()),
        What::Links => {
            let answer = fleet.links().await?;
            links::left_out(&answer).into_iter().for_each(|text| complain(&text));
            links::table(answer.links)
        }
        What::Events => events::list(fleet, &args.names).await?,
        What::Groups => groups::table(fleet.plans("", None).await?),
    })
}
