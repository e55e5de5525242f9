"""Contracts in which every owner's rule is exact: the query is agreed by its text, and runs as it is.

The checks here are not for disclosure, which the owners have judged by reading. They keep the query inside the
contract's tables and its result a function of them: no table functions, files, settings, clocks or chance.
"""

from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa

from enclave_runtime.programs import ProgramRefused
from enclave_runtime.programs.duck import RESULT_BYTES_MAX, TIMESTAMP, column, connect, parse, place, register
from enclave_runtime.programs.inputs import schema_of
from mpc.protocol.contract import Contract
from mpc.protocol.errors import ContractError

_CLASSES = {"COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "OPERATOR", "CASE", "CAST", "BETWEEN", "SUBQUERY"}
_CLASSES |= {"FUNCTION", "WINDOW", "STAR", "COLLATE", "LAMBDA", "TYPE", "POSITIONAL_REFERENCE"}
_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "CTE_NODE", "RECURSIVE_CTE_NODE"}
_NODES |= {"BASE_TABLE", "JOIN", "SUBQUERY", "EXPRESSION_LIST", "EMPTY"}
_NODES |= {"ORDER_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "DISTINCT_MODIFIER"}
_NODES |= {"ORDER_DEFAULT", "ASCENDING", "DESCENDING"}
_SPECIAL = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp", "rowid"}
_SPECIAL |= {"user", "current_user", "session_user", "current_role", "current_schema", "current_catalog"}
_CHANCE = {"reservoir_quantile", "approx_quantile"}
_MACROS = {"if", "nullif", "split_part", "fdiv", "fmod", "date_add", "geomean", "wavg", "weighted_avg"}
_TYPES = {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER"}
_TYPES |= {"UBIGINT", "FLOAT", "DOUBLE", "VARCHAR", "DATE", "TIMESTAMP"}  # and DECIMAL(…)
_HUGE = pa.decimal128(38, 0)  # what the engine calls a sum of integers


def check_exact(contract: Contract) -> list[str]:
    """Names of the result's columns. Raises ContractError."""
    connection = connect(contract, 1)
    try:
        _walk(contract, parse(contract), _functions(connection))
        bound = _bind(connection, contract, [schema_of(table).empty_table() for table in contract.tables])
        columns = list(zip(bound.columns, map(str, bound.types), strict=True))
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:  # it quotes the query, and there is no data
        raise ContractError(f"query: {str(error).splitlines()[0]}") from None
    finally:
        connection.close()
    for name, kind in columns:
        if kind not in _TYPES and not kind.startswith("DECIMAL("):
            raise ContractError(f"query: output {name}", expected="a plain value: cast it", got=kind)
    names = [name for name, _ in columns]
    if len({name.lower() for name in names}) != len(names):
        raise ContractError("query: two outputs of one name", expected="a name of its own for each: … AS name")
    return names


def run_exact(contract: Contract, tables: Sequence[pa.Table]) -> tuple[list[str], list[pa.Array]]:
    """The result's columns. One thread: order and the last bits of sums do not depend on chance.

    Raises: ProgramRefused, duckdb.Error, pyarrow.ArrowException.
    """
    connection = connect(contract, 1)
    found = _bind(connection, contract, tables).to_arrow_table()
    if found.nbytes > RESULT_BYTES_MAX:
        raise ProgramRefused("result-size")
    columns = []
    for values in found.columns:
        if values.type == _HUGE:
            columns.append(column(values.cast(pa.int64()), pa.int64()))
        else:
            columns.append(column(values, TIMESTAMP if pa.types.is_timestamp(values.type) else values.type))
    return found.column_names, columns


def _bind(
    connection: duckdb.DuckDBPyConnection, contract: Contract, tables: Sequence[pa.Table]
) -> duckdb.DuckDBPyRelation:
    """The query over the tables, understood but not run; owners' tables of one name are one table."""
    stacks: dict[str, list[pa.Table]] = {}
    for described, table in zip(contract.tables, tables, strict=True):
        stacks.setdefault(described.name, []).append(table)
    for name, stacked in stacks.items():
        register(connection, name, pa.concat_tables(stacked))
    return connection.sql(contract.program.text)


def _functions(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """What the engine itself calls a function of its arguments, and a few well-known macros over such."""
    rows = connection.execute(
        "SELECT function_name FROM duckdb_functions() WHERE function_type IN ('scalar', 'aggregate', 'window') "
        "GROUP BY ALL HAVING bool_and(stability = 'CONSISTENT')"
    ).fetchall()
    return {name for (name,) in rows} - _CHANCE | _MACROS


def _walk(contract: Contract, tree: dict[str, Any], functions: set[str]) -> None:
    tables = {table.name.lower() for table in contract.tables}
    expected = "one SELECT over the contract's tables, and functions of their columns"
    pending: list[Any] = [tree]
    named: list[tuple[str, dict[str, Any]]] = []  # tables and WITH queries that FROM names
    while pending:
        node = pending.pop()
        if not isinstance(node, dict):
            pending += node if isinstance(node, list) else []
            continue
        pending += node.values()
        kind, where = node.get("type"), place(contract.program.text, node)
        unknown = node["class"] not in _CLASSES if "class" in node else isinstance(kind, str) and kind not in _NODES
        if unknown or not {"sample", "at_clause", "catalog_name", "schema_name", "schema", "catalog"}.isdisjoint(node):
            raise ContractError(f"{where}: {str(kind).lower().replace('_', ' ')}", expected=expected)
        if kind == "BASE_TABLE":
            named.append((node["table_name"].lower(), node))
        if node.get("class") in ("FUNCTION", "WINDOW") and node["function_name"].lower() not in functions:
            raise ContractError(f"{where}: function {node['function_name'][:40]!r}", expected=expected)
        if node.get("class") == "COLUMN_REF" and node["column_names"][-1].lower() in _SPECIAL:
            raise ContractError(f"{where}: {node['column_names'][-1][:40]!r}", expected=expected)
        if "cte_map" in node:
            tables |= {entry["key"].lower() for entry in node["cte_map"].get("map", [])}
    for name, node in named:
        if name not in tables:
            where = place(contract.program.text, node)
            raise ContractError(f"{where}: no table {name[:40]!r} in the contract", expected=expected)
