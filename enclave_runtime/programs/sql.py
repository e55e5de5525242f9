"""One SQL query over the owners' tables, in DuckDB, under the owners' rules.

With a rule of aggregate or noise on any table the query is of the strict grammar in sql_check, and what it means runs
so that sql_protect can judge each group, or sql_noise_run add noise; the author's text does not run. Where all rules
are exact, the text runs (sql_exact).
"""

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import duckdb
import pyarrow as pa

from enclave_runtime.programs import Disclosure, ProgramRefused, duck
from enclave_runtime.programs.duck import column, encode, parser
from enclave_runtime.programs.inputs import TYPES
from enclave_runtime.programs.sql_check import read_query
from enclave_runtime.programs.sql_exact import check_exact, run_exact
from enclave_runtime.programs.sql_noise import check_noise, is_noise, plan
from enclave_runtime.programs.sql_protect import run_protected
from enclave_runtime.programs.sql_query import Aggregate, Group, Output, Query
from mpc.protocol.contract import Contract, Table
from mpc.protocol.errors import ContractError

MEMORY_BYTES_MIN = 320 << 20  # of the engine's process with a small table


def warm() -> None:
    """A connection as a run has it, a table in and a table out."""
    connection = parser()
    connection.register("warm", pa.table({"a": pa.array([1, None], TYPES["int64"])}))
    found = connection.sql("SELECT a, count(*) FROM warm WHERE a > 0 GROUP BY ALL").to_arrow_table()
    connection.unregister("warm")
    encode(found.column_names, [column(values, values.type) for values in found.columns])
    with suppress(ImportError):  # another variant of the image
        import_module("enclave_runtime.programs.sql_noise_run").warm()
    duck.warm()


def check(contract: Contract) -> Disclosure:
    """Raises ContractError: which owner's rule forbids what, where in the query, and the remedy."""
    if contract.enclave.memory_bytes < MEMORY_BYTES_MIN:
        expected, got = (f"{size >> 20} MiB" for size in (MEMORY_BYTES_MIN, contract.enclave.memory_bytes))
        raise ContractError("enclave memory", expected=f"at least {expected}", got=got)
    if _all_exact(contract):
        columns = [(name, "every owner agreed to the query by its text") for name in check_exact(contract)]
        rules = ["exact: this query and no other runs, and all that it gives leaves; read it"]
        return Disclosure(tuple(columns), tuple(rules), contract.recipients, ())
    query = read_query(contract)
    if is_noise(contract):
        return check_noise(contract, query)
    return Disclosure(
        tuple((output.name, _why(contract, query, output)) for output in query.outputs),
        tuple(_rules(contract, query)),
        contract.recipients,
        tuple(_warnings(contract, query)),
    )


def run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    """Args: tables: validated, in the order of the contract's. Returns: recipient → Arrow IPC stream, one for all.

    Raises: ProgramRefused.
    """
    pa.set_cpu_count(contract.enclave.cpus)
    try:
        if _all_exact(contract):
            check_exact(contract)
            names, columns = run_exact(contract, tables)
        else:
            query = read_query(contract)
            if is_noise(contract):
                from enclave_runtime.programs.sql_noise_run import run_noise  # where the image has it

                names, columns = run_noise(plan(contract, query), tables)
            else:
                names, columns = [output.name for output in query.outputs], run_protected(contract, query, tables)
        result = encode(names, columns)
    except ProgramRefused:
        raise
    except ContractError:
        raise ProgramRefused("query") from None
    except (MemoryError, duckdb.OutOfMemoryException):
        raise ProgramRefused("memory") from None
    except Exception:  # the engine's words quote data: none of them goes further
        raise ProgramRefused("engine") from None
    return dict.fromkeys(contract.recipients, result)


def _all_exact(contract: Contract) -> bool:
    return all(table.rule.kind == "exact" for table in contract.tables)


# what mpc check prints


def _sources(contract: Contract, query: Query, relation: int) -> list[Table]:
    return [contract.tables[source] for source in query.relations[relation].sources]


def _why(contract: Contract, query: Query, output: Output) -> str:
    item = output.item
    if item.ref is None:
        return "number of rows"
    tables = _sources(contract, query, item.ref.relation)
    described = tables[0].column(item.ref.column)
    assert described is not None
    what = f"{tables[0].name}.{described.name}"
    if isinstance(item, Group):
        use, shape = "group", f", in buckets {', '.join(map(repr, item.edges))}" if item.edges else ""
        words = f"groups by {what}{shape}"
    else:
        use = item.function
        verb = {
            "sum": "sum",
            "avg": "average",
            "count": "number of values",
            "count_distinct": "number of distinct values",
        }
        clamp = described.clamp if use in ("sum", "avg") else ()
        words = f"{verb[use]} of {what}{f', each first moved into {list(clamp)}' if clamp else ''}"
    owners = ", ".join(
        f"{table.owner} {f'allows {use}' if table.rule.kind == 'aggregate' else 'agreed to the query'}"
        for table in tables
    )
    return f"{words}: {owners}"


def _rules(contract: Contract, query: Query) -> list[str]:
    rules = []
    for relation in range(len(query.relations)):
        for table in _sources(contract, query, relation):
            if table.rule.kind == "exact":
                rules.append(f"{table.name} of {table.owner}: the query is agreed by its text, nothing else is limited")
                continue
            entity = f"distinct {', '.join(table.rule.entity)}" if table.rule.entity else "rows"
            rules.append(
                f"{table.name} of {table.owner}: every group, and every aggregated column in it, rests on none or at "
                f"least {table.rule.k} {entity} of it; groups that do not are left out, and further ones until what "
                f"is left out holds none or at least {table.rule.k}"
            )
    for join in query.joins:
        left, right = (query.relations[i].name for i in (join.left, join.right))
        on = ", ".join(f"{left}.{a} = {right}.{b}" for a, b in join.keys)
        rules.append(f"joined on {on}; if rows could count twice, as keys are not unique, nothing leaves")
    return rules


def _warnings(contract: Contract, query: Query) -> list[str]:
    used = {source for relation in query.relations for source in relation.sources}
    limited = [contract.tables[source] for source in sorted(used) if contract.tables[source].rule.kind == "aggregate"]
    warnings = []
    for recipient in contract.recipients:
        others = [table.owner for table in limited if table.owner != recipient]
        if recipient in contract.parties and others:
            warnings.append(
                f"{recipient} contributes rows and receives the result: with rows that it forges it could read "
                f"single rows of {', '.join(dict.fromkeys(others))} out of the result; no group size prevents that"
            )
    for table in limited:
        if not table.rule.entity:
            warnings.append(f"{table.name} of {table.owner}: each row counts as one entity, whoever it is about")
        if table.rule.k == 1:
            warnings.append(f"{table.name} of {table.owner}: a group of one entity is shown (k = 1)")
    for output in query.outputs:
        item = output.item
        if isinstance(item, Aggregate) and item.ref is not None and item.function in ("sum", "avg"):
            table = _sources(contract, query, item.ref.relation)[0]
            described = table.column(item.ref.column)
            if described is not None and not described.clamp and table in limited:
                warnings.append(f"{output.name}: {table.name}.{described.name} has no clamp: one extreme value shows")
    for source, table in enumerate(contract.tables):
        if source not in used:
            warnings.append(f"{table.name} of {table.owner} is sealed to the enclave, but the query does not use it")
    return warnings
