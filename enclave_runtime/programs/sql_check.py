"""The queries that aggregate rules allow: the engine's own parse tree, read against an allowlist.

What is not listed here is refused: a node, a key of a node, a function, a use of a column. What comes out is
the whole meaning of the query; the author's text is never run.
"""

from collections.abc import Iterable
from typing import Any, Literal

from enclave_runtime.programs.duck import parse, place
from enclave_runtime.programs.sql_query import (
    READERS,
    Aggregate,
    Filter,
    Function,
    Group,
    Join,
    Operator,
    Order,
    Output,
    Query,
    Ref,
    Relation,
    Value,
    labels,
)
from mpc.protocol.contract import Column, Contract, Table, Use
from mpc.protocol.errors import ContractError

RELATIONS_MAX = 16  # in one query; the engine's search for a join order grows with them
VALUES_MAX = 1000  # of one IN
OUTPUTS_MAX = 256

SELECT_ITEMS = "a grouped column, bucket(column), count(*), or count, count(DISTINCT), sum, avg of a column"
CONDITIONS = "comparisons of a column with constants, joined by AND"
SOURCES = "tables of the contract, joined by JOIN or LEFT JOIN on equality of their join columns"

Node = dict[str, Any]


def read_query(contract: Contract) -> Query:
    """The query of the contract, if its grammar and every owner's rule allow it. Raises ContractError."""
    return _Reader(contract).query(parse(contract))


_COMPARISONS: dict[str, Operator] = {
    "COMPARE_EQUAL": "=",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
}
_UNARY: dict[str, Operator] = {
    "COMPARE_IN": "IN",
    "OPERATOR_IS_NULL": "IS NULL",
    "OPERATOR_IS_NOT_NULL": "IS NOT NULL",
}
_EXCLUDING = {"COMPARE_NOTEQUAL", "COMPARE_NOT_IN", "COMPARE_DISTINCT_FROM", "OPERATOR_NOT"}
_WORDS = {  # of the engine's tree, for people
    "having": "HAVING",
    "qualify": "QUALIFY",
    "sample": "a sample",
    "cte_map": "WITH",
    "filter": "FILTER in an aggregate",
    "order_bys": "ORDER BY in an aggregate",
    "column_name_alias": "renaming columns of a table",
    "at_clause": "AT",
    "schema": "a schema before a function",
    "schema_name": "a schema before a table",
    "catalog_name": "a catalog before a table",
    "LIMIT_MODIFIER": "LIMIT",
    "LIMIT_PERCENT_MODIFIER": "LIMIT",
    "DISTINCT_MODIFIER": "SELECT DISTINCT",
    "SET_OPERATION_NODE": "UNION, INTERSECT or EXCEPT",
    "CTE_NODE": "WITH",
    "RECURSIVE_CTE_NODE": "WITH RECURSIVE",
    "TABLE_FUNCTION": "a table function",
    "OPERATOR_CAST": "a cast",
    "CASE_EXPR": "CASE",
    "WINDOW_AGGREGATE": "a window function",
    "VALUE_CONSTANT": "a constant",
    "CONJUNCTION_OR": "OR",
    "SUBQUERY": "a subquery",
}


class _Reader:
    def __init__(self, contract: Contract) -> None:
        self.contract, self.text = contract, contract.program.text
        self.relations: list[Relation] = []
        self.joins: list[Join] = []
        self.merged: dict[str, Ref] = {}  # by USING: the name in lower case → the leftmost column
        self.outputs: list[Output] = []

    def query(self, node: Node) -> Query:
        self._node(
            node,
            "SELECT_NODE",
            {"modifiers", "cte_map", "select_list", "from_table", "where_clause"}
            | {"group_expressions", "group_sets", "aggregate_handling"},
            "one SELECT without subqueries",
        )
        if node["cte_map"] != {}:
            raise self._refusal(node, "WITH has no place here", "one SELECT without subqueries")
        self._from(node["from_table"])
        filters = [self._filter(child) for child in self._and(node.get("where_clause"))]
        for item in node["select_list"]:
            self._output(item)
        self._group_by(node)
        order = self._order_by(node.get("modifiers", []))
        return Query(tuple(self.relations), tuple(self.joins), tuple(filters), tuple(self.outputs), tuple(order))

    # FROM

    def _from(self, node: Node) -> None:
        """Joins lean to the left: unwind them, first table first."""
        joins = []
        while node.get("type") == "JOIN":
            joins.append(node)
            node = node["left"]
        self._relation(node)
        for join in reversed(joins):
            keys = {"left", "right", "condition", "using_columns", "join_type", "ref_type", "is_implicit"}
            self._node(join, "JOIN", keys, SOURCES)
            kind, way = join["join_type"], join["ref_type"]
            if kind not in ("INNER", "LEFT") or way != "REGULAR" or join.get("is_implicit", False):
                words = f"a {way.lower() if way != 'REGULAR' else kind.lower()} join"
                raise self._refusal(join, f"{words} has no place here", SOURCES)
            if join["right"].get("type") == "JOIN":
                raise self._refusal(join["right"], "nested joins have no place here", "one join after the other")
            self._relation(join["right"])
            pairs = self._using(join) if "using_columns" in join else self._on(join)
            self._join(join, pairs, kind == "LEFT")

    def _relation(self, node: Node) -> None:
        self._node(node, "BASE_TABLE", {"alias", "table_name", "qualified_name"}, SOURCES)
        name = node["table_name"]
        sources = [i for i, table in enumerate(self.contract.tables) if table.name.lower() == name.lower()]
        if not sources or node["qualified_name"] != {"path": [name]}:
            tables = sorted({table.name for table in self.contract.tables})
            raise self._refusal(node, f"no table {_shown(name)} in the contract", f"one of {', '.join(tables)}")
        name = self.contract.tables[sources[0]].name
        if any(self.contract.tables[source].name != name for source in sources):
            raise self._refusal(node, f"tables called {name} in other letter cases", "one spelling in the contract")
        if len({table.rule.entity for table in self._rulers(sources)}) > 1:
            raise self._refusal(node, f"the entity of table {name}", "the same columns for all owners who stack theirs")
        if any(relation.name == name for relation in self.relations):
            raise self._refusal(
                node, f"table {name} is used twice", "each table once: a table joined with itself singles out"
            )
        alias = node.get("alias", name)
        if any(relation.alias.lower() == alias.lower() for relation in self.relations):
            raise self._refusal(node, f"alias {_shown(alias)} is used twice", "a name of its own for each table")
        if len(self.relations) == RELATIONS_MAX:
            raise self._refusal(node, "too many tables", f"at most {RELATIONS_MAX}")
        self.relations.append(Relation(alias, name, tuple(sources)))

    def _on(self, join: Node) -> list[tuple[Ref, Ref]]:
        pairs = []
        new = len(self.relations) - 1
        for child in self._and(join.get("condition")):
            self._node(child, "COMPARE_EQUAL", {"left", "right"}, SOURCES)
            left, right = self._column(child["left"], SOURCES), self._column(child["right"], SOURCES)
            if left.relation == new:
                left, right = right, left
            if right.relation != new or left.relation == new:
                raise self._refusal(
                    child, "the condition", f"a column of {self.relations[new].alias} = one of a table before"
                )
            pairs.append((left, right))
        return pairs

    def _using(self, join: Node) -> list[tuple[Ref, Ref]]:
        pairs = []
        new = len(self.relations) - 1
        if "condition" in join:
            raise self._refusal(join, "USING and ON together", "one of them")
        for name in join["using_columns"]:
            right = self._in_relation(new, name)
            before = [ref for relation in range(new) if (ref := self._in_relation(relation, name))]
            left = self.merged.get(name.lower()) or (before[0] if len(before) == 1 else None)
            if left is None or right is None:
                raise self._refusal(join, f"USING ({_shown(name)})", "a column of this table and of exactly one before")
            self.merged[name.lower()] = left
            pairs.append((left, right))
        return pairs

    def _join(self, node: Node, pairs: list[tuple[Ref, Ref]], outer: bool) -> None:
        if not pairs or len({left.relation for left, _ in pairs}) != 1:
            raise self._refusal(node, "the condition", "equality of columns of this table and of one table before")
        for left, right in pairs:
            self._allow(node, left, "join")
            self._allow(node, right, "join")
            if self.contract_column(left).type != self.contract_column(right).type:
                raise self._refusal(
                    node, f"{left.column} and {right.column} are of two types", "join columns of one type"
                )
        keys = tuple((left.column, right.column) for left, right in pairs)
        self.joins.append(Join(pairs[0][0].relation, len(self.relations) - 1, keys, outer))

    # WHERE

    def _filter(self, node: Node) -> Filter:
        kind = node.get("type", "")
        if kind in _EXCLUDING:
            message = "a condition that leaves out what it names singles out by the difference"
            raise self._refusal(node, message, "say what to keep: =, IN, BETWEEN, <, <=, >, >=, IS NULL, IS NOT NULL")
        if kind in _COMPARISONS:
            self._node(node, kind, {"left", "right"}, CONDITIONS)
            return self._compare(node, _COMPARISONS[kind], node["left"], [node["right"]])
        if kind == "COMPARE_BETWEEN":
            self._node(node, kind, {"input", "lower", "upper"}, CONDITIONS)
            return self._compare(node, "BETWEEN", node["input"], [node["lower"], node["upper"]])
        if kind in _UNARY:
            self._node(node, kind, {"children"}, CONDITIONS)
            operand, *values = node["children"]
            if len(values) > VALUES_MAX:
                raise self._refusal(node, "IN", f"at most {VALUES_MAX} values", len(values))
            return self._compare(node, _UNARY[kind], operand, values)
        raise self._unknown(node, CONDITIONS)

    def _compare(self, node: Node, operator: Operator, operand: Node, values: list[Node]) -> Filter:
        item = self._group(operand, "filter", CONDITIONS)
        column = self.contract_column(item.ref)
        if not item.edges:
            return Filter(item, operator, tuple(self._constant(value, column.type) for value in values))
        if operator not in ("=", "IN", "IS NULL", "IS NOT NULL"):
            raise self._refusal(node, f"bucket({column.name})", "= or IN with names of its buckets")
        names = labels(item.edges)
        texts = [self._constant(value, "string") for value in values]
        if unknown := [text for text in texts if text not in names]:
            raise self._refusal(node, f"bucket({column.name})", f"one of {', '.join(names)}", _shown(str(unknown[0])))
        return Filter(item, operator, tuple(names.index(str(text)) for text in texts))

    def _constant(self, node: Node, kind: str) -> Value:
        literal, words = node, {"date": "DATE", "timestamp": "TIMESTAMP"}.get(kind)
        if words and node.get("type") == "OPERATOR_CAST":  # DATE '2026-01-31'
            self._node(node, "OPERATOR_CAST", {"child", "type_expr"}, CONDITIONS)
            named = node["type_expr"].get("type_name", "")
            path = node["type_expr"].get("qualified_name")
            self._node(node["type_expr"], "TYPE", {"type_name", "qualified_name"}, CONDITIONS)
            if named.upper() not in (words, f"{words}TZ") or path != {"path": [named]}:
                raise self._unknown(node, f"a constant {words} 'text'")
            literal = node["child"]
        self._node(literal, "VALUE_CONSTANT", {"literal"}, f"a constant {kind}")
        form, text = literal["literal"]["kind"], literal["literal"].get("text", "")
        read = READERS[kind].get(form)
        if read is not None:
            try:
                return read(text)
            except ValueError:
                pass
        raise self._refusal(node, "the constant", f"a {kind}", f"{form.lower().replace('_', ' ')} {_shown(text)}")

    # SELECT, GROUP BY, ORDER BY

    def _output(self, node: Node) -> None:
        item = self._item(node)
        name = node.get("alias") or self.words(item, short=True)
        if len(name) > 64 or not name.isprintable():
            raise self._refusal(node, "the output's name", "at most 64 printable characters")
        if any(output.name.lower() == name.lower() for output in self.outputs):
            raise self._refusal(node, f"two outputs are called {_shown(name)}", "a name of its own: … AS name")
        if len(self.outputs) == OUTPUTS_MAX:
            raise self._refusal(node, "too many outputs", f"at most {OUTPUTS_MAX}")
        self.outputs.append(Output(name, item))

    def _item(self, node: Node) -> Group | Aggregate:
        if node.get("type") != "FUNCTION" or node.get("function_name") == "bucket":
            return self._group(node, "group", SELECT_ITEMS)
        name, arguments = self._call(node, SELECT_ITEMS)
        distinct = node.get("distinct", False)
        if name in ("count_star", "count") and not arguments and not distinct:
            return Aggregate("rows")
        functions: dict[tuple[str, bool], Function] = {
            ("count", False): "count",
            ("count", True): "count_distinct",
            ("sum", False): "sum",
            ("avg", False): "avg",
        }
        fraction = 0.0
        if any(table.rule.kind == "noise" for table in self.contract.tables):
            functions |= {("variance", False): "variance", ("quantile_cont", False): "quantile"}
            if name == "quantile_cont" and len(arguments) == 2:
                fraction = self._fraction(arguments.pop())
        function = functions.get((name, distinct))
        if function is None or function == "rows" or len(arguments) != 1 or (function == "quantile") != bool(fraction):
            words = f"{name}(DISTINCT …)" if distinct else f"{name}(…)"
            raise self._refusal(node, f"{_shown(words)} has no place here", SELECT_ITEMS)
        ref = self._column(arguments[0], f"a plain column in {name}")
        self._allow(arguments[0], ref, function)
        if function not in ("count", "count_distinct"):
            self._same(arguments[0], ref, "clamp")
            column = self.contract_column(ref)
            if column.type == "int64" and not all(edge.is_integer() for edge in column.clamp):
                raise self._refusal(arguments[0], f"the clamp of {column.name}", "whole numbers, as the column's are")
        return Aggregate(function, ref, fraction)

    def _fraction(self, node: Node) -> float:
        value = self._constant(node, "double")
        if not isinstance(value, float) or not 0 < value < 1:
            raise self._refusal(node, "the quantile", "a fraction between 0 and 1")
        return value

    def _group(self, node: Node, use: Use, expected: str) -> Group:
        """A column, or bucket(column), that its owner lets be used so."""
        bucketed = node.get("type") == "FUNCTION" and node.get("function_name") == "bucket"
        if bucketed:
            _, arguments = self._call(node, expected)
            if len(arguments) != 1 or node.get("distinct", False):
                raise self._refusal(node, "bucket", "bucket(column); its edges are the owner's")
            node = arguments[0]
        ref = self._column(node, "a plain column in bucket" if bucketed else expected)
        self._allow(node, ref, use)
        self._same(node, ref, "buckets")
        column = self.contract_column(ref)
        if bucketed:
            if not column.buckets:
                raise self._refusal(node, f"{column.name} has no buckets", f"{column.name} itself")
            return Group(ref, column.buckets)
        if column.buckets and self._rulers(self.relations[ref.relation].sources):
            raise self._refusal(node, f"{column.name} is shown in buckets only", f"bucket({column.name})")
        return Group(ref)

    def _group_by(self, node: Node) -> None:
        expressions = node.get("group_expressions", [])
        groups = [i for i, output in enumerate(self.outputs) if isinstance(output.item, Group)]
        if node.get("aggregate_handling") == "FORCE_AGGREGATES" and not expressions and "group_sets" not in node:
            return  # GROUP BY ALL
        if node.get("aggregate_handling") != "STANDARD_HANDLING":
            raise self._refusal(node, "GROUP BY", "GROUP BY ALL, or all columns that are not aggregated")
        sets = node.get("group_sets", [])
        if sets != ([list(range(len(expressions)))] if expressions else []):
            raise self._refusal(node, "grouping sets have no place here", "GROUP BY with columns")
        grouped = {self.outputs[self._named(expression, False)].item for expression in expressions}
        for index in groups:
            if self.outputs[index].item not in grouped:
                item = node["select_list"][index]
                raise self._refusal(
                    item, f"{self.outputs[index].name} is neither aggregated nor in GROUP BY", SELECT_ITEMS
                )
        if any(isinstance(item, Aggregate) for item in grouped):
            raise self._refusal(node, "GROUP BY names an aggregate", "columns that are not aggregated")

    def _order_by(self, modifiers: list[Node]) -> list[Order]:
        order = []
        for modifier in modifiers:
            self._node(modifier, "ORDER_MODIFIER", {"orders"}, "ORDER BY and nothing behind it")
            for node in modifier["orders"]:
                if set(node) != {"type", "null_order", "expression"}:
                    raise self._unknown(node, "ORDER BY outputs")
                descending, nulls_first = node["type"] == "DESCENDING", node["null_order"] == "NULLS FIRST"
                expression = node["expression"]
                every = expression.get("type") == "STAR" and expression.get("columns") is True  # ORDER BY ALL
                if every:
                    self._node(expression, "STAR", {"columns"}, "ORDER BY outputs")
                outputs = range(len(self.outputs)) if every else [self._named(expression, True)]
                order += [Order(output, descending, nulls_first) for output in outputs]
        return order

    def _named(self, node: Node, ordering: bool) -> int:
        """Which output GROUP BY or ORDER BY means: by position, by name, or by saying the same again."""
        expected = "an output: its name, its position, or the same expression"
        if node.get("type") == "VALUE_CONSTANT":
            position = self._constant(node, "int64")
            if not isinstance(position, int) or not 1 <= position <= len(self.outputs):
                raise self._refusal(node, "the position", f"1 to {len(self.outputs)}")
            return position - 1
        named = set()
        if node.get("type") == "COLUMN_REF" and len(node["column_names"]) == 1:
            name = node["column_names"][0].lower()
            named = {i for i, output in enumerate(self.outputs) if output.name.lower() == name}
            if named and (ordering or not self._candidates(node)):  # in ORDER BY an output hides a column
                return min(named)
        if node.get("type") not in ("COLUMN_REF", "FUNCTION"):
            raise self._unknown(node, expected)
        item = self._item(node)
        same = {i for i, output in enumerate(self.outputs) if output.item == item}
        if not same or (named and not named <= same):
            what = "this name means an output and a column" if named else "this is not in the SELECT list"
            raise self._refusal(node, what, expected)
        return min(same)

    # columns, and what their owners allow

    def contract_column(self, ref: Ref) -> Column:
        """As its first owner describes it: names and types are the same for all owners of stacked tables."""
        column = self.contract.tables[self.relations[ref.relation].sources[0]].column(ref.column)
        assert column is not None
        return column

    def words(self, item: Group | Aggregate, short: bool = False) -> str:
        """An output as the query would say it."""
        if item.ref is None:
            return "count(*)"
        table = "" if short else f"{self.relations[item.ref.relation].name}."
        inner = f"{table}{item.ref.column}"
        if isinstance(item, Group):
            return f"bucket({inner})" if item.edges else inner
        return f"count(DISTINCT {inner})" if item.function == "count_distinct" else f"{item.function}({inner})"

    def _column(self, node: Node, expected: str) -> Ref:
        self._node(node, "COLUMN_REF", {"column_names", "alias"}, expected)
        found = self._candidates(node)
        if len(found) != 1:
            name = _shown(".".join(node["column_names"]))
            if found:
                aliases = ", ".join(self.relations[ref.relation].alias for ref in found)
                raise self._refusal(
                    node, f"column {name} is in several tables", f"the table's name before it ({aliases})"
                )
            raise self._refusal(node, f"no column {name} in the tables of FROM", "table.column or column")
        return found[0]

    def _candidates(self, node: Node) -> list[Ref]:
        *table, name = node["column_names"]
        if not table and name.lower() in self.merged:
            return [self.merged[name.lower()]]
        refs = (
            self._in_relation(index, name)
            for index, relation in enumerate(self.relations)
            if not table or [relation.alias.lower()] == [part.lower() for part in table]
        )
        return [ref for ref in refs if ref is not None]

    def _in_relation(self, relation: int, name: str) -> Ref | None:
        column = self.contract.tables[self.relations[relation].sources[0]].column(name)
        return Ref(relation, column.name) if column else None

    def _rulers(self, sources: Iterable[int]) -> list[Table]:
        """Owners' tables whose rule is aggregate or noise."""
        tables = (self.contract.tables[source] for source in sources)
        return [table for table in tables if table.rule.kind != "exact"]

    def _allow(self, node: Node, ref: Ref, use: Use) -> None:
        for table in self._rulers(self.relations[ref.relation].sources):
            column = table.column(ref.column)
            assert column is not None
            if use not in column.use:
                allowed = ", ".join(column.use) or "nothing"
                what = f"{table.owner} does not allow {use} of {table.name}.{column.name}"
                raise self._refusal(node, what, f"a use that the owner lists ({allowed}), or another column")

    def _same(self, node: Node, ref: Ref, field: Literal["buckets", "clamp"]) -> None:
        sources = [self.contract.tables[source] for source in self.relations[ref.relation].sources]
        if len({getattr(table.column(ref.column), field) for table in sources}) != 1:
            owners = ", ".join(table.owner for table in sources)
            raise self._refusal(
                node, f"{field} of {sources[0].name}.{ref.column}", f"the same for all owners ({owners})"
            )

    # nodes

    def _call(self, node: Node, expected: str) -> tuple[str, list[Node]]:
        """Name and arguments of a plain function call."""
        keys = {"alias", "function_name", "order_bys", "arguments", "qualified_name", "distinct"}
        self._node(node, "FUNCTION", keys, expected)
        name = node["function_name"]
        if node["order_bys"] != {"type": "ORDER_MODIFIER"} or node["qualified_name"] != {"path": [name]}:
            raise self._refusal(node, f"ORDER BY in {_shown(name)}", expected)
        arguments = node.get("arguments", [])
        if any(set(argument) != {"expression"} for argument in arguments):
            raise self._refusal(node, f"a named argument of {_shown(name)}", expected)
        return name, [argument["expression"] for argument in arguments]

    def _and(self, node: Node | None) -> list[Node]:
        if node is None:
            return []
        if node.get("type") != "CONJUNCTION_AND":
            return [node]
        self._node(node, "CONJUNCTION_AND", {"children"}, CONDITIONS)
        return [leaf for child in node["children"] for leaf in self._and(child)]

    def _node(self, node: Node, kind: str, keys: set[str], expected: str) -> None:
        """Refuse a node of another kind, and one with a key that nobody here reads."""
        if node.get("type") != kind:
            raise self._unknown(node, expected)
        unread = set(node) - keys - {"class", "type", "query_location", "query_location_length"}
        for key in sorted(unread):
            raise self._refusal(node, f"{_WORDS.get(key, key.replace('_', ' '))} has no place here", expected)

    def _unknown(self, node: Node, expected: str) -> ContractError:
        kind = str(node.get("type", "this"))
        words = _WORDS.get(kind, kind.lower().replace("_", " "))
        if kind == "FUNCTION":
            words = f"the function {_shown(str(node.get('function_name')))}"
        return self._refusal(node, f"{words} has no place here", expected)

    def _refusal(self, node: Node, what: str, expected: str, got: object = None) -> ContractError:
        return ContractError(f"{place(self.text, node)}: {what}", expected=expected, got=got)


def _shown(text: str) -> str:
    """A piece of the author's text, as short as an error may quote."""
    return repr(text[:40])
